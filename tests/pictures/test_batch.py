"""Many files: one result per name, nothing replaced or left out without a word, whatever lies in the folders."""

import copy
import os
import pickle
import stat
import threading

import numpy as np
import pytest
from PIL import Image
from processes import Process

from ppsr.archs import ATDLight, PPATDLight
from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.images import read_picture, write_file
from ppsr.pictures import batch
from ppsr.pictures.batch import STREAM, Job, plan_jobs, run_jobs
from ppsr.pictures.upscaler import Upscaler
from ppsr.weights import save_checkpoint


def picture(path, height=6, width=5, seed=0, channels=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image[: height // 2] = 90  # something is pure
    write_file(path, image)
    return path


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def weights(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp('weights') / 'tiny.safetensors'
    save_checkpoint(path, PPATDLight(**tiny).state_dict(), {'type': 'PPATDLight', **tiny})
    return path


@pytest.fixture
def upscale(weights):
    return lambda *words: main(['upscale', '--model-path', str(weights), '--device', 'cpu', *map(str, words)])


@pytest.fixture(params=['upscale', 'mask'])
def command(request, weights):
    """Each command that makes one picture of one: (call, suffix of its results)."""
    own = ['--model-path', str(weights), '--device', 'cpu'] if request.param == 'upscale' else []
    suffix = {'upscale': 'out', 'mask': 'mask'}[request.param]
    return (lambda *words: main([request.param, *own, *map(str, words)])), suffix


# ------------------------------------------------------------------------------------------------------------- masks


def test_masks_collide_with_nothing(here):
    picture(here / 'in/cat.png')
    picture(here / 'in/cat_mask.png', channels=1)
    with pytest.raises(UserError, match=r'out/cat_mask.png would be made of in/cat_mask.png and of in/cat.png'):
        plan_jobs(['in'], 'out', suffix='', save_mask=True)
    assert len(plan_jobs(['in'], 'out', suffix='').jobs) == 2  # without masks there is nothing in the way
    picture(here / 'in/cat_out_mask.png')
    with pytest.raises(UserError, match=r'cat_out_mask.png is an input itself'):
        plan_jobs(['in/cat.png', 'in/cat_out_mask.png'], 'in', save_mask=True)


def test_a_mask_never_replaces_a_file_that_is_there(here, upscale, capsys):
    picture(here / 'cat.png')
    mine = picture(here / 'out/cat_mask.png', channels=1).read_bytes()
    assert upscale('-i', 'cat.png', '-o', 'out', '--suffix', '', '--save-mask') == 0
    assert (here / 'out/cat_mask.png').read_bytes() == mine
    assert 'cat_mask.png exists and is kept' in capsys.readouterr().err
    assert upscale('-i', 'cat.png', '-o', 'out', '--suffix', '', '--save-mask', '--overwrite') == 0
    assert read_picture(here / 'out/cat_mask.png').pixels.shape == (6, 5, 3)


@pytest.mark.parametrize('inputs', ['.', '*.png'])
def test_in_place_and_repeated_nothing_is_made_of_results(here, upscale, inputs, capsys):
    picture(here / 'cat.png')
    for _ in range(3):
        assert upscale('-i', inputs, '-o', '.', '--save-mask') == 0
    assert sorted(os.listdir()) == ['cat.png', 'cat_out.png', 'cat_out_mask.png']
    assert upscale('-i', inputs, '-o', '.') == 0  # masks are no inputs of a run that makes none either
    assert sorted(os.listdir()) == ['cat.png', 'cat_out.png', 'cat_out_mask.png']
    assert 'cat_out.png, cat_out_mask.png: results of an earlier run are no inputs' in capsys.readouterr().err


def test_a_missing_mask_is_made_for_a_picture_that_is_there(here, upscale, capsys):
    picture(here / 'cat.png', 40, 37)
    tiles = ['-t', '16', '--tile-overlap', '4']
    assert upscale('-i', 'cat.png', '-o', 'a', '--save-mask', *tiles) == 0
    assert upscale('-i', 'cat.png', '-o', 'b', *tiles) == 0
    before = (here / 'b/cat_out.png').stat().st_mtime_ns
    assert upscale('-i', 'cat.png', '-o', 'b', '--save-mask', *tiles) == 0
    assert '1 mask drawn' in capsys.readouterr().out
    assert contents(here / 'a') == contents(here / 'b') and (here / 'b/cat_out.png').stat().st_mtime_ns == before
    assert upscale('-i', 'cat.png', '-o', 'b', '--save-mask') == 0 and '1 skipped' in capsys.readouterr().out


def test_a_network_without_mask_says_so_once(here, tiny, capsys):
    for name in 'ab':
        picture(here / f'{name}.png')
    summary = run_jobs(Upscaler(ATDLight(**tiny), device='cpu'), plan_jobs(['a.png', 'b.png'], 'o', save_mask=True))
    assert capsys.readouterr().err.count('exempts no pixels') == 1
    assert len(summary.done) == 2 and sorted(os.listdir('o')) == ['a_out.png', 'b_out.png']


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_the_mask_alone_is_the_mask_of_the_run(tiny, channels):
    image = np.random.default_rng(0).integers(0, 256, (50, 41, channels), dtype=np.uint8)
    image[:30, :20] = 90
    for tile in (0, 16):
        up = Upscaler(PPATDLight(**tiny), device='cpu', tile=tile, tile_overlap=4)
        stats = up.upscale_with_stats(image)[1]
        np.testing.assert_array_equal(up.mask(image), stats.mask)
        assert 0 < stats.mask.mean() < 1
    assert Upscaler(ATDLight(**tiny), device='cpu').mask(image) is None


# ------------------------------------------------------------------------------------------------------------- links


def test_a_link_to_a_picture_is_a_picture(here, command):
    call, suffix = command
    for number in (1, 2, 5):
        picture(here / f'in/f{number}.png', seed=number)
    os.symlink('f2.png', 'in/f3.png')
    os.link('in/f2.png', 'in/f4.png')
    assert call('-i', 'in', '-o', 'out') == 0
    assert sorted(os.listdir('out')) == [f'f{number}_{suffix}.png' for number in range(1, 6)]
    assert (here / f'out/f3_{suffix}.png').read_bytes() == (here / f'out/f2_{suffix}.png').read_bytes()
    assert call('-i', 'in/f2.png', 'in/f3.png', 'in/../in/f3.png', '-o', 'two') == 0
    assert len(os.listdir('two')) == 2


def test_linked_folders_are_followed_and_loops_are_not(here):
    picture(here / 'real/a.png')
    picture(here / 'tree/b.png')
    os.symlink('../real', 'tree/linked')
    os.symlink('..', 'tree/loop')
    os.symlink('.', 'real/itself')
    plan = plan_jobs(['tree'], 'out', recursive=True)
    targets = sorted(str(job.target) for job in plan.jobs)
    assert targets == ['out/b_out.png', 'out/linked/a_out.png']
    assert sum('not followed' in note for note in plan.notes) == len(plan.notes) == 2  # tree/loop, tree/linked/itself
    os.symlink('real', 'again')
    assert len(plan_jobs(['real', 'again', 'real/a.png'], 'out').jobs) == 1  # one file, however it is called
    assert [str(job.target) for job in plan_jobs(['tree'], 'out').jobs] == ['out/b_out.png']


def test_folders_linked_crosswise_end(here, monkeypatch):
    for a in 'abcd':
        picture(here / 'in' / a / 'x.png')
        for b in 'abcd':
            if a != b:
                os.symlink(f'../{b}', f'in/{a}/{b}')
    assert len(plan_jobs(['in'], 'out', recursive=True).jobs) == 4 * (1 + 3 * (1 + 2 * (1 + 1)))
    monkeypatch.setattr(batch, 'MAX_FOLDERS', 30)
    with pytest.raises(UserError, match='more than 30 folders'):
        plan_jobs(['in'], 'out', recursive=True)


def test_a_result_that_links_to_an_input_is_refused(here):
    picture(here / 'in/a.png')
    os.makedirs('out')
    os.symlink('../in/a.png', 'out/a_out.png')
    with pytest.raises(UserError, match='is an input itself'):
        plan_jobs(['in'], 'out')


# ----------------------------------------------------------------------------------------------- what lies in folders


def test_what_is_no_file_is_passed_over_with_a_line(here, command, capsys):
    call, suffix = command
    picture(here / 'in/a.png')
    os.mkfifo('in/pipe.png')
    (here / 'in/folder.png').mkdir()
    (here / 'in/paper.pdf').write_text('%PDF')
    assert call('-i', 'in', '-o', 'out') == 0
    assert os.listdir('out') == [f'a_{suffix}.png']
    assert 'pipe.png is a pipe, a socket or a device' in capsys.readouterr().err


def test_what_should_have_been_an_input_counts_as_failed(here, command, capsys, monkeypatch):
    call, suffix = command
    picture(here / 'in/a.png')
    picture(here / 'in/closed/b.png')
    os.symlink('nowhere.png', 'in/gone.png')
    scandir = os.scandir

    def closed(path):  # root may enter any folder, so the refusal is made here
        if str(path).endswith('closed'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', closed)
    assert call('-i', 'in', '-o', 'out', '-r') == 1
    said = capsys.readouterr().err
    assert 'in/closed cannot be read: Permission denied' in said and 'gone.png is a link that leads nowhere' in said
    assert os.listdir('out') == [f'a_{suffix}.png']


@pytest.mark.parametrize('name', [os.fsdecode(b'caf\xe9.png'), '写' * 40 + '.png', 'a\nb.png', '-x.png', 'a $5 $6.png'])
def test_any_name(here, command, name, capfd):
    call, suffix = command
    picture(here / 'in' / name)
    assert call('-i', 'in', '-o', 'out') == 0
    assert os.listdir('out') == [f'{name[:-4]}_{suffix}.png']


def test_a_name_that_gets_too_long_is_one_files_trouble(here, command, capsys):
    call, suffix = command
    for name in ('a', 'z', 'n' * 250):
        picture(here / f'in/{name}.png')
    assert call('-i', 'in', '-o', 'out') == 1
    assert sorted(os.listdir('out')) == [f'a_{suffix}.png', f'z_{suffix}.png']
    assert 'File name too long' in capsys.readouterr().err
    assert call('-i', 'in', '-o', 'same', '--suffix', '') == 0 and len(os.listdir('same')) == 3


# ----------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize('name', ['x.bmp', 'x.gif', 'x.AVIF', 'x.pdf'])
def test_a_picture_of_another_kind_is_not_a_folder(here, command, name, capsys):
    call, _ = command
    picture(here / 'a.png')
    assert call('-i', 'a.png', '-o', name) == 2
    assert 'cannot write that kind of file' in capsys.readouterr().err and os.listdir() == ['a.png']
    assert call('-i', 'a.png', '-o', name + '/') == 0  # who means a folder can say so
    assert os.path.isdir(name)
    assert call('-i', 'a.png', '-o', name, '--overwrite') == 0


def test_a_folder_in_the_place_of_a_result_is_no_result(here, command, capsys):
    call, suffix = command
    for name in 'ab':
        picture(here / f'{name}.png')
    os.makedirs(f'out/a_{suffix}.png')
    assert call('-i', 'a.png', 'b.png', '-o', 'out') == 1
    assert f'a_{suffix}.png is a folder' in capsys.readouterr().err
    assert os.path.isfile(f'out/b_{suffix}.png')


@pytest.mark.parametrize('output', ['n' * 300, 'file', 'file/x', 'a.png/x'])
def test_an_output_that_cannot_be_is_told(here, command, output, capsys):
    call, _ = command
    picture(here / 'a.png')
    (here / 'file').write_text('')
    assert call('-i', 'a.png', '-o', output) in (1, 2)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and len(said) < 300
    assert sorted(os.listdir()) == ['a.png', 'file']


def test_permissions_of_a_replaced_result_are_kept(here, command):
    call, suffix = command
    picture(here / 'a.png')
    result = picture(here / f'out/a_{suffix}.png')
    result.chmod(0o600)
    assert call('-i', 'a.png', '-o', 'out', '--overwrite') == 0
    assert stat.S_IMODE(result.stat().st_mode) == 0o600


# ----------------------------------------------------------------------------------------------------------- streams


def through_a_pipe(path, data):
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: path.write_bytes(data))
    thread.start()
    return thread


def test_a_named_pipe_is_read(here, command):
    """What `-i <(cat p.png)` is."""
    call, suffix = command
    data = picture(here / 'a.png').read_bytes()
    thread = through_a_pipe(here / 'pipe.png', data)
    assert call('-i', 'pipe.png', '-o', 'out') == 0
    thread.join()
    assert call('-i', 'a.png', '-o', 'out') == 0
    assert (here / f'out/pipe_{suffix}.png').read_bytes() == (here / f'out/a_{suffix}.png').read_bytes()


@pytest.mark.parametrize(
    'shell, said',
    [
        ('< a.png > /dev/full', b'No space left on device'),
        ('< a.png >&-', b'tandard output is closed'),
        ('<&-', b'Standard input is closed'),
        ('< /dev/null', b'empty'),
    ],
)
def test_standard_streams_that_cannot_be_used(here, weights, shell, said):
    picture(here / 'a.png')
    line = ['upscale', '-i', '-', '-o', '-', '--model-path', str(weights), '--device', 'cpu']
    process = Process(line, shell=shell)
    assert process.wait() in (1, 2) and process.stdout == b''
    assert said in process.stderr and b'Traceback' not in process.stderr and b'ignored' not in process.stderr


def test_no_temporary_folder_is_a_sentence(here, upscale, monkeypatch, capfd):
    import tempfile

    def missing(*args, **kwargs):
        raise FileNotFoundError(2, 'No usable temporary directory found in /nowhere')

    picture(here / 'a.png')
    monkeypatch.setattr(tempfile, 'TemporaryFile', missing)
    assert upscale('-i', 'a.png', '-o', '-') == 1
    assert 'No usable temporary directory' in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------- Upscaler


def test_what_was_lent_is_given_back(here, tiny):
    said = []
    up = Upscaler(PPATDLight(**tiny), device='cpu', say=said.append)
    picture(here / 'a.png')
    run_jobs(up, plan_jobs(['a.png'], 'out'))
    up.say('after')
    assert said == ['after']


@pytest.mark.parametrize('way', [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
def test_an_upscaler_can_be_pickled_and_copied(tiny, way):
    up = Upscaler(PPATDLight(**tiny), device='cpu', tile=16, tile_overlap=4, outscale=3)
    image = np.asarray(Image.effect_noise((20, 30), 50).convert('RGB'))
    expected = up(image)
    other = way(up)
    assert other.stats is None and up.stats is not None
    np.testing.assert_array_equal(other(image), expected)
    assert other.stats.output_size == (60, 90)


@pytest.mark.parametrize('quality', ['a', 0, 101, None, 10**400])
def test_a_quality_that_is_none(here, tiny, quality):
    up = Upscaler(PPATDLight(**tiny), device='cpu')
    with pytest.raises(UserError, match='quality must be a number from 1 to 100'):
        up.upscale_file(picture(here / 'a.png'), here / 'b.jpg', quality=quality)
    assert os.listdir() == ['a.png']


# ------------------------------------------------------------------------------------------------------- planning


def test_names_of_outputs(tmp_path):
    for name in ('a.jpg', 'b.png', 'c.bmp', 'sub/d.tif', '.hidden.png', 'notes.txt'):
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'in' / name).touch()

    def targets(*inputs, output='out', **options):
        plan = plan_jobs([str(tmp_path / i) for i in inputs], str(tmp_path / output), **options)
        return [str(job.target.relative_to(tmp_path)) for job in plan.jobs]

    assert targets('in') == ['out/a_out.jpg', 'out/b_out.png', 'out/c_out.png']
    assert targets('in', recursive=True) == ['out/a_out.jpg', 'out/b_out.png', 'out/c_out.png', 'out/sub/d_out.tif']
    assert targets('in/*.[jp][pn]g', suffix='', ext='webp') == ['out/a.webp', 'out/b.webp']
    assert targets('in/**/*.tif') == ['out/d_out.tif']
    assert targets('in/a.jpg', output='result.png') == ['result.png']
    assert targets('in/a.jpg', 'in/a.jpg', 'in') == ['out/a_out.jpg', 'out/b_out.png', 'out/c_out.png']
    assert plan_jobs(['-'], '-').jobs == [Job(STREAM, STREAM)]
    assert targets('in', output='in') == ['in/a_out.jpg', 'in/b_out.png', 'in/c_out.png']
    (tmp_path / 'in' / 'a_out.jpg').touch()  # the result of an earlier run is no input
    assert targets('in', output='in') == ['in/a_out.jpg', 'in/b_out.png', 'in/c_out.png']
    (tmp_path / 'in' / 'out').mkdir()
    (tmp_path / 'in' / 'out' / 'a_out.jpg').touch()
    assert 'in/out/out/a_out_out.jpg' not in targets('in', output='in/out', recursive=True)


@pytest.mark.parametrize(
    'inputs, output, options, message',
    [
        (['nothing.png'], 'out', {}, 'does not exist'),
        (['*.gif'], 'out', {}, 'matches no file'),
        (['empty'], 'out', {}, 'no pictures'),
        (['a.png', 'b.png'], 'x.png', {}, 'one output'),
        (['a.png', 'b.png'], '-', {}, 'one output'),
        (['a.png', 'a.jpg'], 'out', {'ext': 'png'}, 'made of a.jpg and of a.png'),
        (['a.png'], '.', {'suffix': ''}, 'is an input'),
        (['a.png'], 'a.png', {}, 'is an input'),
        (['a.png', 'a_out.png'], '.', {}, 'is an input'),
        (['a.png'], 'out', {'suffix': '../x'}, 'separator'),
        (['a.png'], 'out', {'ext': 'bmp'}, 'extension'),
    ],
)
def test_plans_that_would_lose_something_are_refused(tmp_path, monkeypatch, inputs, output, options, message):
    monkeypatch.chdir(tmp_path)
    for name in ('a.png', 'b.png', 'a.jpg', 'a_out.png'):
        (tmp_path / name).touch()
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match=message):
        plan_jobs(inputs, output, **options)
