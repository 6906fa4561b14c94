"""Locks between processes: exclusive, said with host and process, and gone with whoever held them."""

import errno
import multiprocessing
import os
import shutil
import signal
import socket
import time

import pytest
from processes import Process

from ppsr import locks
from ppsr.errors import UserError
from ppsr.locks import Lock

HOLD = """
import os, time
from ppsr.locks import Lock
lock = Lock({path!r}, 'The data set').acquire()
child = os.fork() if {fork} else 0
if child or not {fork}:
    print('held', child, flush=True)
time.sleep(60)
"""


def start_holder(path, fork=False):
    """A process that holds the lock until it is killed, and its child."""
    process = Process(HOLD.format(path=str(path), fork=fork))
    process.until(lambda: process.stdout.endswith(b'\n'))
    word, child = process.stdout.decode().split()
    assert word == 'held'
    return process, int(child)


def test_the_second_is_told_who_has_it(tmp_path):
    path = tmp_path / 'new' / '.lock'
    process, _ = start_holder(path)
    try:
        with pytest.raises(UserError) as error:
            Lock(path, 'The data set').acquire()
        assert str(error.value).startswith(f'The data set is in use by process {process.pid} on {socket.gethostname()}')
    finally:
        process.kill()
    with Lock(path, 'The data set') as lock:  # what a killed process left behind locks nobody out
        assert lock.held and path.exists()
    assert not lock.held and not path.exists()


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path):
    process, child = start_holder(tmp_path / 'lock', fork=True)
    try:
        process.kill()
        os.kill(child, 0)  # still there
        Lock(tmp_path / 'lock', 'x').acquire().release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_excludes_within_a_process_and_ends_with_its_block(tmp_path):
    path = tmp_path / 'lock'
    with pytest.raises(ZeroDivisionError), Lock(path, 'It'):
        with pytest.raises(UserError, match=f'^It is in use by process {os.getpid()} on '):
            Lock(path, 'It').acquire()
        raise ZeroDivisionError
    with Lock(path, 'It'):
        pass


def test_a_folder_that_was_moved_takes_its_lock_along(tmp_path):
    """An experiment that is archived while its lock is held: the new folder's lock file is not removed for it."""
    old = Lock(tmp_path / 'run' / 'lock', 'Old').acquire()
    shutil.move(tmp_path / 'run', tmp_path / 'archived')
    new = Lock(tmp_path / 'run' / 'lock', 'New').acquire()
    old.release()
    assert new.path.exists()
    with pytest.raises(UserError, match='New'):
        Lock(new.path, 'New').acquire()
    new.release()


def contend(path, turns):
    """Take and release the lock as fast as it goes, until it was had `turns` times; nobody else may be inside."""
    while turns:
        try:
            with Lock(path, 'x'):
                os.close(os.open(f'{path}.inside', os.O_CREAT | os.O_EXCL))
                os.unlink(f'{path}.inside')
                turns -= 1
        except UserError:
            time.sleep(1e-4)


def test_many_at_once_are_one_at_a_time(tmp_path):
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=contend, args=(tmp_path / 'lock', 100)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_no_reason_to_fail(tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, 'flock', refuse)
    with Lock(tmp_path / 'lock', 'x'):
        pass
    assert not (tmp_path / 'lock').exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'cannot be written: .*; choose another folder\.$'):
        Lock(tmp_path / 'file' / 'lock', 'x').acquire()
