"""PairedSRDataset and the checks of data sets: samples equal to basicsr's, and one sentence for whatever is wrong."""

import os
import pickle
import random
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import pytest
import torch
from basicsr.utils.registry import METRIC_REGISTRY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ppsr.data.checks import check_datasets
from ppsr.data.lmdb_store import build_lmdb, open_lmdb
from ppsr.data.paired_sr_dataset import PairedSRDataset
from ppsr.data.pairs import read_names
from ppsr.errors import DataError, UserError
from ppsr.images import decode_rgb, image_size

SCALE = 2


def save(path, height, width, mode='RGB', seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    img = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(img).save(path)
    return img


@pytest.fixture
def root(tmp_path):
    """Four pairs at scale 2; the names sort differently from the order in which they are written."""
    for seed, name in enumerate(['d', 'b', 'a.b', 'c c']):
        save(tmp_path / f'HR/{name}.png', 24, 20, seed=seed)
        save(tmp_path / f'LR/{name}.png', 12, 10, seed=seed + 10)
    return tmp_path


def options(root, phase='val', **more):
    opt = {
        'name': 'small',
        'type': 'PairedSRDataset',
        'dataroot_gt': str(root / 'HR'),
        'dataroot_lq': str(root / 'LR'),
        'io_backend': {'type': 'disk'},
        'scale': SCALE,
        'phase': phase,
    }
    if phase == 'train':
        opt.update(gt_size=8, use_hflip=True, use_rot=True)
    return {**opt, **more}


def lmdb_options(root, **more):
    for kind in ('HR', 'LR'):
        names = sorted(path.name for path in (root / kind).iterdir())
        build_lmdb(root / kind, names, root / f'{kind}.lmdb')
    return options(
        root,
        dataroot_gt=str(root / 'HR.lmdb'),
        dataroot_lq=str(root / 'LR.lmdb'),
        **{'io_backend': {'type': 'lmdb'}, **more},
    )


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


def assert_one_sentence(error, *parts):
    text = str(error.value)
    assert '\n' not in text and text.endswith('.')
    for part in parts:
        assert part in text


def test_items_hold_the_pixels(root):
    from basicsr.data import build_dataset  # importable once ppsr is

    dataset = build_dataset(options(root))
    assert isinstance(dataset, PairedSRDataset) and len(dataset) == 4
    assert [dataset[i]['gt_path'].rsplit('/')[-1] for i in range(4)] == ['a.b.png', 'b.png', 'c c.png', 'd.png']
    item = dataset[1]
    assert item['lq'].shape == (3, 12, 10) and item['gt'].shape == (3, 24, 20)
    assert item['lq'].dtype == item['gt'].dtype == torch.float32
    expected = np.asarray(Image.open(root / 'HR/b.png')).transpose(2, 0, 1)
    np.testing.assert_array_equal((item['gt'] * 255).round().numpy(), expected)
    assert item['lq_path'] == str(root / 'LR/b.png')


@pytest.mark.parametrize('phase', ['train', 'val'])
def test_equals_basicsr_for_the_same_random_state(root, phase):
    from basicsr.data.paired_image_dataset import PairedImageDataset  # importable once ppsr is

    ours, theirs = PairedSRDataset(options(root, phase)), PairedImageDataset(options(root, phase))
    order = {path['gt_path']: index for index, path in enumerate(theirs.paths)}
    for index in range(len(ours)):
        for seed in range(4):
            random.seed(seed)
            a = ours[index]
            random.seed(seed)
            b = theirs[order[a['gt_path']]]
            assert torch.equal(a['lq'], b['lq']) and torch.equal(a['gt'], b['gt'])


def test_uncropped_gt_is_cropped_in_both_phases(root):
    save(root / 'HR/b.png', 25, 21)
    assert PairedSRDataset(options(root))[1]['gt'].shape == (3, 24, 20)
    assert PairedSRDataset(options(root, 'train', gt_size=20))[1]['gt'].shape == (3, 20, 20)


def test_suffixes_templates_and_other_files(root):
    shutil.move(root / 'LR/b.png', root / 'LR/b.bmp')  # Pillow looks at the contents
    (root / 'HR/Thumbs.db').write_bytes(b'x')
    assert len(PairedSRDataset(options(root))) == 4
    for path in list((root / 'LR').iterdir()):
        path.rename(path.with_name(f'{path.stem}x2{path.suffix}'))
    assert len(PairedSRDataset(options(root, filename_tmpl='{}x2'))) == 4
    with pytest.raises(DataError) as error:
        PairedSRDataset(options(root))
    assert_one_sentence(error, "'{}x2'", 'no partner')


def test_meta_info_file_selects(root):
    meta = root / 'meta.txt'
    meta.write_text('b.png (24,20,3)\nc c.png (24,20,3)\n')
    dataset = PairedSRDataset(options(root, meta_info_file=str(meta)))
    assert [dataset.pairs.paths(i)[1] for i in range(2)] == [str(root / 'HR/b.png'), str(root / 'HR/c c.png')]
    meta.write_text('nobody.png (24,20,3)\n')
    with pytest.raises(DataError) as error:
        PairedSRDataset(options(root, meta_info_file=str(meta)))
    assert_one_sentence(error, 'nobody.png')


@pytest.mark.parametrize('kind', ['pipe', 'device'])
def test_meta_info_file_without_an_end_is_refused(tmp_path, kind):
    path = '/dev/zero'
    if kind == 'pipe':
        path = tmp_path / 'pipe'
        os.mkfifo(path)
    with pytest.raises(DataError, match=f'meta_info_file {path} is no regular file'):
        read_names(str(path))


@pytest.mark.parametrize(
    'text',
    [
        'b.png (24,20,3)\r\nc c.png (24,20,3)\r\n',
        '\ufeffb.png (24,20,3)\nc c.png (24,20,3)\n',
        'b.png\t(24,20,3)\nc c.png\t24\t20\n',
        'b.png  (24, 20, 3)  1\n\n  c c.png   (24,20,3)\n',
        'c c.png\nb.png\nb.png\n',
    ],
    ids=['Windows', 'byte order mark', 'tabs', 'blanks', 'names alone, one twice'],
)
def test_meta_info_file_as_people_write_it(root, text):
    (root / 'meta.txt').write_bytes(text.encode())
    dataset = PairedSRDataset(options(root, meta_info_file=str(root / 'meta.txt')))
    assert [dataset[i]['gt_path'] for i in range(len(dataset))] == [str(root / 'HR/b.png'), str(root / 'HR/c c.png')]
    stored = PairedSRDataset(lmdb_options(root, meta_info_file=str(root / 'meta.txt')))
    assert [stored.pairs.paths(i)[0][-8:] for i in range(len(stored))] == ['db/b.png', '/c c.png']


@pytest.mark.parametrize('nested', [True, False], ids=['LQ in the same subfolders', 'LQ in one folder'])
def test_meta_info_file_names_subfolders(root, nested):
    for seed, name in enumerate(['one/a.png', 'one/b (1,2).png', 'two/deep/c.png']):
        save(root / 'HR' / name, 24, 20, seed=seed)
        save(root / 'LR' / (name if nested else name.rsplit('/')[-1]), 12, 10, seed=seed)
    meta = root / 'meta.txt'
    meta.write_text('two/deep/c.png (24,20,3)\none/b (1,2).png (24,20,3)\none/a.png (24,20,3)\n')
    opt = options(root, meta_info_file=str(meta))
    dataset = PairedSRDataset(opt)
    found = [tuple(path.split(f'{root}/')[1] for path in dataset.pairs.paths(i)) for i in range(3)]
    names = ['one/a.png', 'one/b (1,2).png', 'two/deep/c.png']
    assert found == [(f'LR/{n if nested else n.rsplit("/")[-1]}', f'HR/{n}') for n in names]
    assert dataset[2]['gt'].shape == (3, 24, 20)
    # basicsr's own class takes the first word, and looks in the LQ folder itself
    theirs = {**opt, 'type': 'PairedImageDataset'}
    with pytest.raises(DataError, match='PairedImageDataset would look for'):
        check_datasets({'scale': 2, 'datasets': {'val': theirs}})
    meta.write_text('one/a.png (24,20,3)\n')
    if not nested:
        check_datasets({'scale': 2, 'datasets': {'val': theirs}})


def test_meta_info_file_with_names_that_do_not_do(root):
    save(root / 'HR/sub/b.png', 24, 20)
    meta = root / 'meta.txt'
    for text, words in [
        ('../HR/b.png\n', 'outside of'),
        (f'{root}/HR/b.png\n', 'outside of'),
        ('b.png (24,20,3)\nsub/b.png (24,20,3)\n', 'would both be paired with'),
        ('sub/none.png (24,20,3)\n', 'not in'),
        ('nowhere/b.png (24,20,3)\n', 'not in'),
        ('\n\n', 'names no images'),
    ]:
        meta.write_text(text)
        with pytest.raises(DataError) as error:
            PairedSRDataset(options(root, meta_info_file=str(meta)))
        assert_one_sentence(error, words, 'meta.txt')


@pytest.mark.parametrize('workers', [0, 2])
def test_lmdb_equals_folder(root, workers):
    opt = lmdb_options(root)
    folder, dataset = PairedSRDataset(options(root)), PairedSRDataset(opt)
    again = PairedSRDataset(opt)  # lmdb itself refuses to open a path twice in a process
    loader = torch.utils.data.DataLoader(dataset, num_workers=workers)
    for index, item in enumerate(loader):
        assert torch.equal(item['gt'][0], folder[index]['gt']) and torch.equal(item['lq'][0], again[index]['lq'])
    assert index == 3


def test_lmdb_after_reading_pickles_for_spawn_and_serves_threads(root):
    dataset = PairedSRDataset(lmdb_options(root))
    first = dataset[0]['lq']
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0]['lq'], first)
    with ThreadPoolExecutor(4) as threads:
        for index, item in enumerate(threads.map(dataset.__getitem__, [0, 1, 2, 3] * 4)):
            assert torch.equal(item['gt'], copy[index % 4]['gt'])


def test_lmdb_read_by_spawned_workers(root):
    dataset = PairedSRDataset(lmdb_options(root))
    expected = [dataset[index]['lq'] for index in range(4)]
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, multiprocessing_context='spawn')
    for item, lq in zip(loader, expected, strict=True):
        assert torch.equal(item['lq'][0], lq)


def drop_from_lmdb(root):
    opt = lmdb_options(root)
    with lmdb.open(str(root / 'LR.lmdb'), map_size=2**24) as env, env.begin(write=True) as transaction:
        transaction.delete(b'b')
    return opt


def lmdb_of_other_scale(root):
    for path in list((root / 'LR').iterdir()):
        save(path, 8, 6)
    return lmdb_options(root)


def lmdb_with_other_keys(root):
    opt = lmdb_options(root)
    names = [path.name for path in (root / 'LR').iterdir() if path.stem != 'd']
    build_lmdb(root / 'LR', names, root / 'LR.lmdb')
    return opt


def lmdb_without_meta(root):
    opt = lmdb_options(root)
    (root / 'HR.lmdb/meta_info.txt').unlink()
    return opt


def lmdb_with_broken_meta(root):
    opt = lmdb_options(root)
    (root / 'HR.lmdb/meta_info.txt').write_text('a.png\n')
    return opt


def lmdb_of_garbage(root):
    opt = lmdb_options(root)
    shutil.rmtree(root / 'LR.lmdb')
    (root / 'LR.lmdb').mkdir()
    (root / 'LR.lmdb/data.mdb').write_bytes(b'nothing' * 2000)
    shutil.copy(root / 'HR.lmdb/meta_info.txt', root / 'LR.lmdb')
    return opt


def remove(what):
    def change(root):
        path = root / what
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return options(root)

    return change


def without_key(key):
    def change(root):
        opt = options(root, 'train')
        del opt[key]
        return opt

    return change


def changed(phase='val', **values):
    return lambda root: options(root, phase, **values)


def empty_folder(root):
    shutil.rmtree(root / 'LR')
    (root / 'LR').mkdir()
    (root / 'LR/notes.txt').write_text('no image')
    return options(root)


def file_for_folder(root):
    shutil.rmtree(root / 'LR')
    (root / 'LR').write_text('x')
    return options(root)


def other_size(root):
    save(root / 'LR/b.png', 11, 10)
    return options(root)


def garbage_image(root):
    (root / 'LR/b.png').write_text('not a picture')
    return options(root)


def bomb(root):
    (root / 'HR/b.png').write_bytes(png_header(100_000, 100_000))
    return options(root)


def same_stem(root):
    shutil.copy(root / 'HR/b.png', root / 'HR/b.jpg')
    return options(root)


MISTAKES = {
    'lmdb incomplete': (drop_from_lmdb, ['LR.lmdb', 'incomplete']),
    'lmdb of another scale': (lmdb_of_other_scale, ['LR.lmdb', 'scale 2']),
    'lmdb with other keys': (lmdb_with_other_keys, ["'d'"]),
    'lmdb without meta': (lmdb_without_meta, ['meta_info.txt', 'missing']),
    'lmdb with broken meta': (lmdb_with_broken_meta, ['Line 1', 'meta_info.txt']),
    'lmdb of garbage': (lmdb_of_garbage, ['LR.lmdb']),
    'lmdb missing': (changed(io_backend={'type': 'lmdb'}, dataroot_lq='/nowhere/x.lmdb'), ['/nowhere/x.lmdb']),
    'lmdb as folder': (changed(dataroot_lq='x.lmdb'), ['io_backend']),
    'folder missing': (remove('LR'), ['LR', 'does not exist']),
    'folder empty': (empty_folder, ['LR', 'no images']),
    'file for folder': (file_for_folder, ['LR', 'is a file']),
    'lq missing': (remove('LR/b.png'), ["'b.png'", 'no partner']),
    'gt missing': (remove('HR/b.png'), ["'b.png'", 'no partner']),
    'size': (other_size, ['b.png', '11x10', 'scale 2']),
    'scale': (changed(scale=4), ['scale 4']),
    'garbage': (garbage_image, ['b.png', 'not a picture that can be read']),
    'bomb': (bomb, ['b.png', 'too large to be opened safely']),
    'same stem': (same_stem, ["'b.jpg'", "'b.png'"]),
    'meta missing': (changed(meta_info_file='/nowhere/m.txt'), ['/nowhere/m.txt']),
    'no gt root': (without_key('dataroot_gt'), ['dataroot_gt']),
    'root is a number': (changed(dataroot_gt=4), ['dataroot_gt', 'str']),
    'no gt_size': (without_key('gt_size'), ['gt_size']),
    'gt_size odd': (changed('train', gt_size=7), ['gt_size 7']),
    'gt_size too large': (changed('train', gt_size=22), ['smaller than the training patch']),
    'backend': (changed(io_backend={'type': 'memcached'}), ['memcached']),
    'template': (changed(filename_tmpl='x4'), ['filename_tmpl']),
    'check_pairs': (changed(check_pairs=0), ['check_pairs']),
    'color': (changed(color='y'), ['color']),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_mistake_gives_one_sentence_before_training(root, case):
    change, parts = MISTAKES[case]
    opt = change(root)
    with pytest.raises(UserError) as error:
        check_datasets({'scale': opt.pop('scale'), 'datasets': {opt.pop('phase'): opt}})
    assert_one_sentence(error, *parts)


def test_good_data_sets_of_each_type_pass(root):
    disk = {'type': 'disk'}
    folders = {'dataroot_gt': str(root / 'HR'), 'dataroot_lq': str(root / 'LR')}
    train = {'gt_size': 8, 'use_hflip': True, 'use_rot': False}
    datasets = {
        'train': {'type': 'PairedImageDataset', 'io_backend': disk, **folders, **train},
        'val': {'type': 'PairedSRDataset', **folders},
        'val_2': {'type': 'SingleImageDataset', 'io_backend': disk, 'dataroot_lq': str(root / 'LR')},
        'test_1': {'type': 'SomebodysDataset', 'dataroot': '/nowhere'},
    }
    check_datasets({'scale': 2, 'datasets': datasets})
    with pytest.raises(UserError, match='no images'):
        (root / 'none').mkdir()
        check_datasets({'datasets': {'val': {**datasets['val_2'], 'dataroot_lq': str(root / 'none')}}})
    with pytest.raises(UserError, match='is not 2 times'):
        save(root / 'HR/b.png', 25, 20)
        check_datasets({'scale': 2, 'datasets': {'train': datasets['train']}})
    for broken in ({}, {'datasets': None}, {'datasets': {'val': 3}}, {'datasets': {'vali': {}}}):
        with pytest.raises(UserError):
            check_datasets(broken)


@pytest.mark.parametrize(
    ('metric', 'smallest'), [('calculate_psnr', 1 + 2 * 3), ('calculate_ssim', 11 + 2 * 3)], ids=['psnr', 'ssim']
)
@pytest.mark.parametrize('kind', ['PairedSRDataset', 'PairedImageDataset'])
def test_image_too_small_for_a_metric_is_named_before_training(root, metric, smallest, kind):
    """basicsr: NaN, or a traceback of OpenCV's, hours later."""
    metrics = {'m': {'type': metric, 'crop_border': 3}}
    opt = {'scale': 1, 'datasets': {'val': options(root, scale=1, type=kind)}, 'val': {'metrics': metrics}}
    shutil.rmtree(root / 'LR')
    shutil.copytree(root / 'HR', root / 'LR')
    for side, fits in ((smallest, True), (smallest - 1, False)):
        for folder in ('HR', 'LR'):
            save(root / folder / 'b.png', 24, side)
        image = np.zeros((24, side, 3), np.uint8)
        with np.errstate(all='ignore'):
            try:
                value = METRIC_REGISTRY.get(metric)(image, image + 1, 3)
            except Exception:
                value = np.nan
        assert np.isfinite(value) == fits  # what the check has to foresee
        if fits:
            check_datasets(opt)
        else:
            with pytest.raises(DataError) as error:
                check_datasets(opt)
            assert_one_sentence(error, 'HR/b.png', f'(24x{side})', 'val → metrics → m', f'{smallest} pixels')
    opt['datasets'] = {'train': {**options(root, 'train', scale=1, gt_size=4), 'type': kind}}
    check_datasets(opt)  # training scores nothing


def test_two_sets_of_one_name_are_refused(root):
    sets = {'train': options(root, 'train'), 'val': options(root), 'val_2': options(root, name='SMALL')}
    with pytest.raises(DataError, match=r"datasets\.val and datasets\.val_2 are both called 'SMALL'"):
        check_datasets({'scale': 2, 'datasets': sets})
    sets['val_2']['name'] = 'other'
    check_datasets({'scale': 2, 'datasets': sets})  # the training set may be called like one of them


@pytest.mark.parametrize('workers', [0, 1])
def test_image_that_breaks_during_training_is_named(root, workers):
    dataset = PairedSRDataset(options(root, 'train'))
    content = (root / 'LR/b.png').read_bytes()
    (root / 'LR/b.png').write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as error:
        list(torch.utils.data.DataLoader(dataset, num_workers=workers))
    assert_one_sentence(error, str(root / 'LR/b.png'), 'truncated')


def test_a_sample_of_many_images_is_looked_at(tmp_path, monkeypatch):
    save(tmp_path / 'HR/0.png', 8, 8)
    save(tmp_path / 'LR/0.png', 4, 4)
    for index in range(1, 1000):
        for kind in ('HR', 'LR'):
            (tmp_path / f'{kind}/{index}.png').symlink_to(tmp_path / f'{kind}/0.png')
    headers = []
    monkeypatch.setattr('ppsr.data.pairs.image_size', lambda path: headers.append(path) or image_size(path))
    assert len(PairedSRDataset(options(tmp_path, check_pairs=100))) == 1000
    assert len(set(headers)) == len(headers) == 200
    headers.clear()
    PairedSRDataset(options(tmp_path, check_pairs='all'))
    assert len(headers) == 2000


@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'RGBA', 'LA', '1', 'CMYK', 'I;16'])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    gray = np.random.default_rng(0).integers(0, 256, (6, 5), dtype=np.uint8)
    if mode == 'I;16':
        Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / 'x.png')
        expected = gray
    else:
        image = Image.fromarray(gray).convert(mode)
        path = tmp_path / ('x.tif' if mode == 'CMYK' else 'x.png')
        image.save(path)
        expected = np.asarray(Image.open(path).convert('RGB'))[..., 0]
    path = next(tmp_path.iterdir())
    rgb = decode_rgb(path)
    assert rgb.shape == (6, 5, 3) and rgb.dtype == np.uint8 and rgb.flags.writeable
    assert image_size(path) == (6, 5)
    np.testing.assert_array_equal(rgb[..., 0], expected)


def test_camera_orientation_is_applied_to_size_and_pixels(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    Image.new('RGB', (8, 4)).save(tmp_path / 'x.jpg', exif=exif)
    assert image_size(tmp_path / 'x.jpg') == (8, 4) == decode_rgb(tmp_path / 'x.jpg').shape[:2]


@pytest.fixture(scope='module')
def some_png(tmp_path_factory):
    path = tmp_path_factory.mktemp('png') / 'x.png'
    save(path, 9, 7)
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_an_image_or_a_sentence(some_png, data):
    content = bytearray(some_png)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        img = decode_rgb(content, 'x.png')
    except DataError as error:
        assert str(error).startswith('x.png') and '\n' not in str(error)
    else:
        assert img.dtype == np.uint8 and img.shape[2] == 3


def test_environment_is_shared_and_replaced_with_its_lmdb(root):
    lmdb_options(root)
    first = open_lmdb(root / 'LR.lmdb')
    assert open_lmdb(str(root / 'HR/../LR.lmdb')) is first
    build_lmdb(root / 'LR', ['b.png'], root / 'LR.lmdb')
    assert open_lmdb(root / 'LR.lmdb').stat()['entries'] == 1
