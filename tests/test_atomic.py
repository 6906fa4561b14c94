"""Whole or not there: under any name, on any file system, with the permissions that were there."""

import errno
import os
import stat

import pytest

from ppsr.atomic import atomic_path


def write(path, text='new'):
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_new_file_has_ordinary_permissions_and_a_replaced_one_keeps_its_own(tmp_path, umask):
    path = tmp_path / 'x.png'
    write(path)
    assert mode(path) == 0o640
    for kept in (0o600, 0o444, 0o666):
        os.chmod(path, kept)
        write(path, f'{kept}')
        assert mode(path) == kept and path.read_text() == f'{kept}'
    assert os.listdir(tmp_path) == ['x.png']


def test_a_private_file_is_private_while_it_is_written(tmp_path):
    path = tmp_path / 'x'
    write(path)
    os.chmod(path, 0o600)
    with atomic_path(path) as temporary:
        assert mode(temporary) == 0o600
        temporary.write_text('secret')


@pytest.mark.parametrize('call, number', [('chmod', errno.EPERM), ('fsync', errno.EINVAL), ('fsync', errno.ENOSYS)])
def test_file_systems_that_refuse_niceties(tmp_path, monkeypatch, call, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    write(tmp_path / 'x', 'old')
    monkeypatch.setattr(os, call, refuse)
    write(tmp_path / 'x')
    assert (tmp_path / 'x').read_text() == 'new' and os.listdir(tmp_path) == ['x']


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_what_did_not_reach_the_disk_is_not_called_written(tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    write(tmp_path / 'x', 'old')
    monkeypatch.setattr(os, 'fsync', refuse)
    with pytest.raises(OSError):
        write(tmp_path / 'x')
    assert (tmp_path / 'x').read_text() == 'old' and os.listdir(tmp_path) == ['x']


@pytest.mark.parametrize('name', ['n' * 251 + '.png', '写' * 83 + '.png', '写' * 85, b'caf\xe9.png', 'x.' + 'e' * 253])
def test_every_name_that_a_file_can_have(tmp_path, name):
    """Also the longest: the temporary name must not be longer."""
    path = tmp_path / os.fsdecode(name)
    write(path)
    assert path.read_text() == 'new' and len(os.listdir(tmp_path)) == 1


def test_a_failed_block_leaves_what_was_there(tmp_path):
    write(tmp_path / 'x', 'old')
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / 'x') as temporary:
        temporary.write_text('half')
        raise KeyboardInterrupt
    assert (tmp_path / 'x').read_text() == 'old' and os.listdir(tmp_path) == ['x']


def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'folder').mkdir()
    for name in ('pipe', 'folder'):
        with pytest.raises(OSError):
            write(tmp_path / name)
    assert stat.S_ISFIFO(os.stat(tmp_path / 'pipe').st_mode) and sorted(os.listdir(tmp_path)) == ['folder', 'pipe']
