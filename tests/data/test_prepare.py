"""`ppsr prepare`: what it makes, that it resumes, what it refuses, and what --check finds."""

import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import Process

from ppsr.cli import main
from ppsr.data import demo
from ppsr.data.bicubic import imresize_bicubic, modcrop
from ppsr.data.layout import DataSetFolders, find_sources
from ppsr.data.lmdb_store import read_meta_info
from ppsr.data.paired_sr_dataset import PairedSRDataset
from ppsr.data.prepare import Grid, in_parallel, sub_image_boxes
from ppsr.errors import UserError
from ppsr.images import list_images
from ppsr.locks import Lock


def save(path, height, width, mode='RGB', seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if mode == 'L' else (height, width, 3)
    img = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(img).save(path)


def load(path):
    with Image.open(path) as image:
        assert image.mode == 'RGB'
        return np.array(image)


def tree(root):
    """Every visible file under root with its contents."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob('*'))
        if path.is_file() and path.name not in ('lock.mdb', 'data.mdb')
    }


@pytest.fixture
def hr(tmp_path):
    """Three published images, none a multiple of the scales, one of them gray."""
    save(tmp_path / 'published/one.png', 50, 45, seed=1)
    save(tmp_path / 'published/two.two.png', 31, 62, seed=2)
    save(tmp_path / 'published/three.png', 26, 27, 'L', seed=3)
    return tmp_path / 'published'


def prepare(*words):
    return main(['prepare', *map(str, words)])


def test_makes_exact_lr_of_cropped_hr(hr, tmp_path, capsys):
    assert prepare('--hr', hr, '--name', 'Three', '-o', tmp_path / 'data', '--jobs', 2) == 0
    out = capsys.readouterr().out
    assert 'three.png: gray -> 8-bit RGB' in out
    assert 'Three: 3 images made, 0 already there, 0 unreadable' in out
    root = tmp_path / 'data/Three'
    for name in ('one', 'two.two', 'three'):
        img = load(root / f'HR/{name}.png')
        np.testing.assert_array_equal(img, np.asarray(Image.open(hr / f'{name}.png').convert('RGB')))
        for scale in (2, 3, 4):
            lr = load(root / f'LRbicx{scale}/{name}.png')
            assert lr.shape[:2] == (img.shape[0] // scale, img.shape[1] // scale)
            np.testing.assert_array_equal(lr, imresize_bicubic(modcrop(img, scale), scale))
    assert sorted(path.name for path in root.iterdir()) == ['HR', 'LRbicx2', 'LRbicx3', 'LRbicx4']
    assert not [name for name in tree(root) if '/.' in name]  # no temporary file is left


def test_resumes_and_overwrites(hr, tmp_path, capsys):
    words = ['--hr', hr, '-o', tmp_path, '--name', 'X', '--scale', 2, 4, '--jobs', 1]
    words += ['--sub-images', '--crop-size', 16, '--step', 8, '--meta-info', '--lmdb']
    assert prepare(*words) == 0
    root = tmp_path / 'X'
    whole = tree(root)
    (root / 'LRbicx4/one.png').unlink()
    (root / 'HR/three.png').unlink()
    (root / 'HR_x2_sub/two.two_s002.png').unlink()
    (root / 'LRbicx2/three.png').unlink()
    capsys.readouterr()
    assert prepare(*words) == 0
    assert 'X: 3 images made, 0 already there' in capsys.readouterr().out
    assert tree(root) == whole
    assert prepare(*words) == 0
    assert 'X: 0 images made, 3 already there' in capsys.readouterr().out
    save(root / 'LRbicx4/one.png', 12, 11)  # right size, wrong contents
    assert prepare(*words, '--overwrite') == 0
    assert 'X: 3 images made' in capsys.readouterr().out
    assert tree(root) == whole


def test_sub_images_cut_the_same_place_from_hr_and_lr(hr, tmp_path):
    words = ['--hr', hr, '-o', tmp_path, '--name', 'X', '--scale', 2, '--jobs', 1]
    assert prepare(*words, '--sub-images', '--crop-size', 16, '--step', 8, '--meta-info') == 0
    root = tmp_path / 'X'
    # one.png: 50x45 -> LR 25x22; tops 0 4 8 12 16 and 17 for the rest of 1; lefts 0 4 8 12 and 14
    names = [name for name in list_images(root / 'HR_x2_sub') if name.startswith('one_')]
    assert (
        names
        == [f'one_s{number:03d}.png' for number in range(1, 31)]
        == [name for name in list_images(root / 'LRbicx2_sub') if name.startswith('one_')]
    )
    hr_img, lr_img = load(root / 'HR/one.png'), load(root / 'LRbicx2/one.png')
    np.testing.assert_array_equal(load(root / 'HR_x2_sub/one_s030.png'), hr_img[34:50, 28:44])
    np.testing.assert_array_equal(load(root / 'LRbicx2_sub/one_s030.png'), lr_img[17:25, 14:22])
    np.testing.assert_array_equal(load(root / 'LRbicx2_sub/one_s007.png'), lr_img[4:12, 4:12])
    meta = (root / 'meta_info_x2_sub.txt').read_text().splitlines()
    assert meta[0] == 'one_s001.png (16,16,3)' and len(meta) == len(list_images(root / 'HR_x2_sub'))
    opt = {'dataroot_gt': str(root / 'HR_x2_sub'), 'dataroot_lq': str(root / 'LRbicx2_sub'), 'scale': 2}
    opt.update(name='x', phase='train', gt_size=16, meta_info_file=str(root / 'meta_info_x2_sub.txt'))
    assert PairedSRDataset(opt)[0]['gt'].shape == (3, 16, 16)


@given(
    st.integers(1, 60), st.integers(1, 60), st.sampled_from([2, 3, 4]), st.integers(1, 8), st.integers(1, 8),
    st.integers(0, 20),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_boxes_lie_inside_and_leave_no_more_than_the_threshold(height, width, scale, crop, step, thresh):
    grid = Grid(crop * scale, min(step, crop) * scale, thresh)
    boxes = sub_image_boxes(height, width, scale, grid)
    assert len(set(boxes)) == len(boxes) >= 1
    covered = np.zeros((height, width), bool)
    for top, left, h, w in boxes:
        assert 0 <= top <= height - h and 0 <= left <= width - w
        assert (h, w) == (min(crop, height), min(crop, width))
        covered[top : top + h, left : left + w] = True
    for axis, length in ((1, height), (0, width)):
        assert (length - covered.any(axis=axis).sum()) * scale <= thresh


def test_lmdb_holds_the_images_and_serves_training(hr, tmp_path):
    from basicsr.data.data_util import paired_paths_from_lmdb  # importable once ppsr is

    (hr / 'two.two.png').rename(hr / 'two.png')  # basicsr's own reader cuts keys at the first dot
    words = ['--hr', hr, '-o', tmp_path, '--name', 'X', '--scale', 2, 4, '--lmdb', '--jobs', 1]
    assert prepare(*words) == 0
    root = tmp_path / 'X'
    assert len(paired_paths_from_lmdb([str(root / 'LRbicx4.lmdb'), str(root / 'HR.lmdb')], ['lq', 'gt'])) == 3
    opt = {'dataroot_gt': str(root / 'HR.lmdb'), 'dataroot_lq': str(root / 'LRbicx4.lmdb'), 'scale': 4, 'name': 'x'}
    opt.update(phase='val', io_backend={'type': 'lmdb'})
    item = PairedSRDataset(opt)[0]
    np.testing.assert_array_equal((item['lq'].numpy().transpose(1, 2, 0) * 255).round(), load(root / 'LRbicx4/one.png'))
    # an image is added: the LMDBs are built again
    save(hr / 'four.png', 20, 20)
    assert prepare(*words) == 0
    assert len(PairedSRDataset(opt)) == 4
    assert not [path.name for path in root.iterdir() if path.name.startswith('.')]


def test_unreadable_images_get_a_line_each_and_the_rest_is_made(hr, tmp_path, capsys):
    content = (hr / 'one.png').read_bytes()
    (hr / 'cut.png').write_bytes(content[: len(content) // 2])
    (hr / 'text.jpg').write_text('not a picture')
    save(hr / 'tiny.png', 3, 9)
    words = ['--hr', hr, '-o', tmp_path, '--name', 'X', '--lmdb', '--meta-info', '--jobs', 2]
    assert prepare(*words) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 3 and 'Traceback' not in captured.err
    for name, word in (
        ('cut.png', 'truncated'),
        ('text.jpg', 'not a picture that can be read'),
        ('tiny.png', 'too small'),
    ):
        assert sum(name in line and word in line for line in lines) == 1
    assert '3 images made, 0 already there, 3 unreadable' in captured.out
    for folder in ('HR', 'LRbicx2', 'LRbicx4'):
        assert list_images(tmp_path / f'X/{folder}') == ['one.png', 'three.png', 'two.two.png']
    assert len((tmp_path / 'X/meta_info.txt').read_text().splitlines()) == 3


def test_works_in_place_and_leaves_published_files_alone(tmp_path):
    save(tmp_path / 'Set5/HR/baby.png', 21, 23)
    before = (tmp_path / 'Set5/HR/baby.png').read_bytes()
    assert prepare('--hr', tmp_path / 'Set5', '-o', tmp_path, '--scale', 3, '--overwrite', '--jobs', 1) == 0
    assert (tmp_path / 'Set5/HR/baby.png').read_bytes() == before
    assert load(tmp_path / 'Set5/LRbicx3/baby.png').shape == (7, 7, 3)


@pytest.mark.parametrize(
    'folder, given, names',
    [
        ('DIV2K/DIV2K_train_HR', 'DIV2K', ['DIV2K']),
        ('x/DIV2K_train_HR', 'x/DIV2K_train_HR', ['DIV2K']),
        ('x/DIV2K_valid_HR', 'x/DIV2K_valid_HR', ['DIV2K_valid']),
        ('Flickr2K/Flickr2K_HR', 'Flickr2K', ['Flickr2K']),
        ('benchmark/B100/HR', 'benchmark', ['BSD100']),
        ('benchmark/Manga109/HR', 'benchmark/Manga109/HR', ['Manga109']),
        ('mine', 'mine', ['mine']),
    ],
)
def test_knows_published_layouts(tmp_path, folder, given, names):
    save(tmp_path / folder / '0001.png', 12, 12)
    found = find_sources([tmp_path / given], [2, 3, 4])
    assert list(found) == names
    assert [source.stem for source in found[names[0]]] == ['0001']


def test_knows_the_files_of_urban100(tmp_path, capsys):
    folder = tmp_path / 'Urban100/image_SRF_4'
    for kind in ('HR', 'LR', 'bicubic'):
        save(folder / f'img_001_SRF_4_{kind}.png', 12, 12)
    assert prepare('--hr', tmp_path / 'Urban100', '-o', tmp_path / 'data', '--scale', 4, '--jobs', 1) == 0
    assert list(tree(tmp_path / 'data')) == ['Urban100/HR/img_001.png', 'Urban100/LRbicx4/img_001.png']
    assert prepare('--hr', folder, '-o', tmp_path / 'data') == 2
    assert 'cropped for scale 4' in capsys.readouterr().err


def mistakes(hr, tmp_path):
    shutil.copytree(hr, tmp_path / 'twice')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('x')
    save(tmp_path / 'placed/HR/photo.jpg', 12, 12)
    other = ['--hr', hr, '-o', tmp_path, '--name', 'X', '--scale', 2, '--sub-images', '--step', 8, '--jobs', 1]
    assert prepare(*other, '--crop-size', 16) == 0
    save(tmp_path / 'own/HR_x2_sub/a.png', 8, 8)
    return {
        'nothing': [],
        'does not exist': ['--hr', tmp_path / 'nowhere'],
        'No images': ['--hr', tmp_path / 'empty'],
        'is a file': ['--hr', tmp_path / 'file'],
        'would both become': ['--hr', hr, tmp_path / 'twice', '--name', 'Y', '-o', tmp_path],
        'must be PNG': ['--hr', tmp_path / 'placed', '-o', tmp_path],
        'another grid': [*other, '--crop-size', 24],
        'not made here': ['--hr', hr, '-o', tmp_path, '--name', 'own', '--scale', 2, '--sub-images'],
        'multiple of scale': ['--hr', hr, '-o', tmp_path, '--scale', 3, '--sub-images', '--crop-size', 16],
        '--thresh-size': ['--hr', hr, '-o', tmp_path, '--sub-images', '--thresh-size', -1],
        '--scale needs': ['--hr', hr, '--scale', 2, 2],
        '--scale: ': ['--hr', hr, '--scale', 0],
        '--jobs': ['--hr', hr, '--jobs', 0],
        '--name must': ['--hr', hr, '--name', '../x'],
        'only reads': ['--check', '--hr', hr],
        'no data set': ['--check', '-o', tmp_path / 'empty'],
        'cannot be made': ['--hr', hr, '-o', tmp_path / 'file'],
    }


def test_mistakes_give_one_sentence_and_exit_code_2(hr, tmp_path, capsys):
    for part, words in mistakes(hr, tmp_path).items():
        capsys.readouterr()
        before = tree(tmp_path)
        assert prepare(*words) == 2, part
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith('ppsr: error: ') and lines[0].endswith('.'), lines
        if part not in ('nothing', 'cannot be made'):
            assert part in lines[0]
        assert tree(tmp_path) == before, part


def test_non_ascii_names_cannot_be_lmdb_keys(hr, tmp_path, capsys):
    save(hr / 'größe.png', 12, 12)
    words = ['--hr', hr, '-o', tmp_path, '--name', 'X', '--scale', 2, '--jobs', 1]
    assert prepare(*words) == 0
    assert prepare(*words, '--lmdb', '--meta-info') == 1  # one file's trouble: said, and the others are stored
    assert 'größe.png cannot be a key' in capsys.readouterr().err
    assert sorted(read_meta_info(tmp_path / 'X/HR.lmdb/meta_info.txt')) == ['one', 'three', 'two.two']
    assert 'größe.png (12,12,3)' in (tmp_path / 'X/meta_info.txt').read_text()


def test_check_finds_what_is_wrong(hr, tmp_path, capsys):
    words = ['--hr', hr, '-o', tmp_path, '--name', 'X', '--scale', 2, 3, '--jobs', 1]
    assert prepare(*words, '--sub-images', '--crop-size', 24, '--step', 12, '--lmdb') == 0
    capsys.readouterr()
    check = ['--check', '-o', tmp_path, '--jobs', 2]
    assert prepare(*check) == 0
    captured = capsys.readouterr()
    assert captured.err == '' and '0 problems' in captured.out

    root = tmp_path / 'X'
    content = (root / 'LRbicx2/one.png').read_bytes()
    (root / 'LRbicx2/one.png').write_bytes(content[: len(content) // 2])
    Image.open(root / 'HR/three.png').resize((9, 8)).save(root / 'LRbicx3/three.png')  # Pillow's, not MATLAB's
    (root / 'LRbicx3/one.png').unlink()
    save(root / 'LRbicx2_sub/one_s001.png', 9, 9)
    (root / 'HR_x3_sub.lmdb/meta_info.txt').write_text('one_s001.png (24,24,3) 3\n')
    assert prepare(*check, '--name', 'X') == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert '8 problems' in captured.out and len(lines) == 8, captured.err
    for parts in (
        ('LRbicx2/one.png', 'truncated'),
        ('LRbicx3/three.png', 'not the exact bicubic'),
        ("'one.png'", 'no partner', 'LRbicx3'),
        ('LRbicx2_sub/one_s001.png', 'it is 9x9, not 12x12'),
        ('LRbicx2_sub.lmdb/one_s001.png in the LMDB is not the image',),
        ('HR_x3_sub.lmdb', 'incomplete'),
    ):
        assert sum(all(part in line for part in parts) for line in lines) == 1, parts
    assert prepare(*check, '--name', 'X', '--scale', 4) == 1
    assert 'LRbicx4 does not exist' in capsys.readouterr().err


def test_killed_run_leaves_no_broken_file_and_resumes(tmp_path):
    rng = random.Random(0)
    for index in range(12):
        save(tmp_path / f'published/{index:02d}.png', 72, 72, seed=index)
    words = ['--hr', tmp_path / 'published', '-o', tmp_path, '--name', 'X', '--scale', '2', '--sub-images']
    words += ['--crop-size', '24', '--step', '12', '--lmdb', '--meta-info', '--jobs', '1']
    process = Process(['prepare', *words])
    target = 30 + rng.randrange(200)
    folder = tmp_path / 'X/LRbicx2_sub'
    process.until(lambda: folder.is_dir() and len(os.listdir(folder)) >= target)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in Path(tmp_path / 'X').rglob('*.png'):
        if not path.name.startswith('.'):
            load(path)  # whole
    assert not (tmp_path / 'X/HR_x2_sub.lmdb').exists()
    assert prepare(*words) == 0
    assert prepare('--check', '-o', tmp_path, '--name', 'X', '--jobs', 1) == 0
    assert len(list_images(tmp_path / 'X/LRbicx2_sub')) == 12 * 25


def test_demo_data_is_made_once_and_held_out(tmp_path):
    pytest.importorskip('skimage')
    demo.make_demo_data(tmp_path)
    first = tree(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.png')}
    demo.make_demo_data(tmp_path)
    assert tree(tmp_path) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.png')}
    assert list_images(tmp_path / 'demo_val/HR') == ['astronaut.png', 'chelsea.png', 'coffee.png']
    assert not set(list_images(tmp_path / 'demo_val/HR')) & set(list_images(tmp_path / 'demo_train/HR'))
    for name in ('demo_train', 'demo_val'):
        opt = {'dataroot_gt': str(tmp_path / name / 'HR'), 'dataroot_lq': str(tmp_path / name / 'LRbicx4')}
        dataset = PairedSRDataset({**opt, 'name': name, 'scale': 4, 'phase': 'train', 'gt_size': 192})
        assert len(dataset) == len(list_images(tmp_path / name / 'HR')) >= 3
    assert sum(map(len, first.values())) < 8e6
    assert prepare('--check', '-o', tmp_path, '--jobs', 1) == 0


def test_demo_says_which_photograph_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.VAL, 'nobody.png', (0, 0, 8, 8))
    with pytest.raises(demo.UserError, match=r'lacks nobody\.png'):
        demo.make_demo_data(tmp_path)


# ----------------------------------------------------------------------------------------- what is there already


WORDS = ['--name', 'X', '--scale', 2, '--jobs', 1]
EVERYTHING = [*WORDS, '--sub-images', '--crop-size', 24, '--step', 24, '--lmdb', '--meta-info']


def replace(path, height, width, seed):
    """As editors do it: a new file under the old name, whatever links there are to the old one."""
    save(path.with_name('new.png'), height, width, seed=seed)
    os.replace(path.with_name('new.png'), path)


@pytest.mark.parametrize('size', [(50, 45), (24, 24)], ids=['same size', 'smaller'])
def test_a_replaced_source_is_named_and_replaced_on_demand(hr, tmp_path, capsys, size):
    words = ['--hr', hr, '-o', tmp_path, *EVERYTHING]
    assert prepare(*words) == 0 and prepare(*words) == 0
    before = tree(tmp_path / 'X')
    replace(hr / 'one.png', *size, seed=9)
    capsys.readouterr()
    assert prepare(*words) == 2
    said = capsys.readouterr().err
    assert 'X/HR/one.png would be replaced' in said and '--overwrite' in said
    assert tree(tmp_path / 'X') == before

    assert prepare(*words, '--overwrite') == 0
    shutil.rmtree(tmp_path / 'fresh', ignore_errors=True)
    assert prepare('--hr', hr, '-o', tmp_path / 'fresh', *EVERYTHING) == 0
    assert tree(tmp_path / 'X') == tree(tmp_path / 'fresh/X')  # no surplus sub-image, no stale LMDB, no old line
    for name in ('HR_x2_sub', 'LRbicx2_sub'):
        folder, stored = tmp_path / 'X' / name, read_meta_info(tmp_path / 'X' / f'{name}.lmdb' / 'meta_info.txt')
        assert sorted(f'{key}.png' for key in stored) == list_images(folder)
    assert prepare('--check', '-o', tmp_path, '--name', 'X', '--jobs', 1) == 0


def test_what_was_made_of_a_replaced_image_is_made_again_unasked(hr, tmp_path):
    assert prepare('--hr', hr, '-o', tmp_path, *EVERYTHING) == 0
    assert prepare('--hr', hr, '-o', tmp_path, '--name', 'X', '--scale', 2, 4, '--lmdb', '--jobs', 1) == 0
    replace(hr / 'one.png', 40, 40, seed=9)
    assert prepare('--hr', hr, '-o', tmp_path, *WORDS, '--overwrite') == 0  # only x2, neither LMDB nor sub-images
    assert load(tmp_path / 'X/LRbicx4/one.png').shape == (10, 10, 3)
    assert prepare('--check', '-o', tmp_path, '--name', 'X', '--jobs', 1) == 0


def test_lr_images_never_become_hr_images(tmp_path, capsys):
    save(tmp_path / 'images/a.png', 24, 24)
    assert prepare('--hr', tmp_path / 'images', '-o', tmp_path / 'ds', '--scale', 2, '--jobs', 1) == 0
    before = tree(tmp_path / 'ds')
    lr = tmp_path / 'ds/images/LRbicx2'
    assert prepare('--hr', lr, '-o', tmp_path / 'ds', '--name', 'images', '--scale', 2, '--jobs', 1) == 2
    assert 'images/HR/a.png would be replaced' in capsys.readouterr().err and tree(tmp_path / 'ds') == before


def test_an_edited_meta_file_is_not_written_over(hr, tmp_path, capsys):
    words = ['--hr', hr, '-o', tmp_path, *WORDS, '--meta-info']
    assert prepare(*words) == 0
    meta = tmp_path / 'X/meta_info.txt'
    meta.write_text('mine.png (1,1,3)\n' + meta.read_text())
    assert prepare(*words) == 2 and 'mine.png' in capsys.readouterr().err and 'mine.png' in meta.read_text()
    assert prepare(*words, '--overwrite') == 0 and 'mine.png' not in meta.read_text()


def test_two_folders_of_one_name_are_refused_with_what_to_do(tmp_path, capsys):
    for folder in 'ab':
        save(tmp_path / folder / f'images/{folder}.png', 12, 12)
    folders = [tmp_path / 'a/images', tmp_path / 'b/images']
    words = ['-o', tmp_path / 'ds', '--scale', 2, '--jobs', 1]
    assert prepare('--hr', *folders, *words) == 2
    said = capsys.readouterr().err
    assert "would both become the data set 'images'" in said and '--name' in said
    assert not (tmp_path / 'ds').exists()
    assert prepare('--hr', *folders, '--name', 'both', *words) == 0
    assert list_images(tmp_path / 'ds/both/HR') == ['a.png', 'b.png']
    assert prepare('--hr', folders[0], folders[0], *words) == 0  # the same folder twice is one


def test_one_at_a_time(hr, tmp_path, capsys):
    with Lock(tmp_path / 'X/.lock', 'The data set X'):
        assert prepare('--hr', hr, '-o', tmp_path, *WORDS) == 2
    assert f'in use by process {os.getpid()}' in capsys.readouterr().err
    assert prepare('--hr', hr, '-o', tmp_path, *WORDS) == 0 and not (tmp_path / 'X/.lock').exists()


def test_what_a_killed_run_left_is_cleared_away(hr, tmp_path):
    assert prepare('--hr', hr, '-o', tmp_path, *WORDS, '--lmdb') == 0
    (tmp_path / 'X/HR/.ppsr-0.part.png').write_text('half')
    (tmp_path / 'X/.ppsr-0.part.lmdb').mkdir()
    assert prepare('--hr', hr, '-o', tmp_path, *WORDS, '--lmdb') == 0
    assert not list((tmp_path / 'X').rglob('.*'))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_signals_end_the_workers_quietly(tmp_path, number):
    for index in range(24):
        save(tmp_path / f'published/{index:02d}.png', 200, 200, seed=index)
    words = ['--hr', tmp_path / 'published', '-o', tmp_path, '--name', 'X', '--jobs', '2']
    process = Process(['prepare', *words])
    process.until(lambda: list((tmp_path / 'X').glob('LRbicx2/*.png')))
    process.send_signal(number)
    assert process.wait(60) in (128 + number, -number)  # and the last worker has closed its streams
    error = process.stderr.decode()
    assert 'Traceback' not in error and 'BrokenPipe' not in error, error
    if number != signal.SIGKILL:
        assert not list((tmp_path / 'X').rglob('.*'))
    assert prepare(*words) == 0 and not list((tmp_path / 'X').rglob('.*'))


def kill_own_process(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_worker_is_a_sentence_and_no_hang():
    with pytest.raises(UserError, match='worker process was killed'):
        list(in_parallel(kill_own_process, list(range(8)), 2, 'test'))


def test_check_looks_at_sub_images_lmdbs_and_meta_files(hr, tmp_path, capsys):
    assert prepare('--hr', hr, '-o', tmp_path, *EVERYTHING) == 0
    root = DataSetFolders(tmp_path / 'X')
    save(root.hr_sub(2) / 'one_s001.png', 24, 24, seed=77)  # of the right size, and not what it should be
    for folder in (root.hr_sub(2), root.lr_sub(2)):
        shutil.copy(folder / 'one_s002.png', folder / 'one_s099.png')
    root.meta_info_sub(2).write_text('gone.png (24,24,3)\none_s002.png (23,24,3)\n')
    capsys.readouterr()
    assert prepare('--check', '-o', tmp_path, '--name', 'X', '--jobs', 1) == 1
    said = capsys.readouterr().err
    for part in (
        'HR_x2_sub/one_s001.png is not the part of one.png',
        'HR_x2_sub/one_s099.png is left over',
        'HR_x2_sub.lmdb/one_s001.png in the LMDB is not the image',
        'meta_info_x2_sub.txt names gone.png',
        'another size of one_s002.png',
    ):
        assert part in said, part
