"""``ppsr upscale``, with everything that can go wrong."""

import errno
import io
import os
import pickle
import signal

import numpy as np
import pytest
from picture_cases import noise, png
from PIL import Image, ImageCms
from processes import Process

from ppsr.archs import ATDLight, PPATDLight
from ppsr.cli import main
from ppsr.images import read_picture
from ppsr.pictures import upscaler
from ppsr.weights import save_checkpoint

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


@pytest.fixture
def weights(tmp_path, tiny):
    """A tiny PP-ATD-light with its configuration, as a file."""
    path = tmp_path / 'weights' / 'tiny.safetensors'
    save_checkpoint(path, PPATDLight(**tiny).state_dict(), {'type': 'PPATDLight', **tiny})
    return path


def test_command_on_a_folder_with_all_kinds_of_files(tmp_path, weights, capsys):
    source, out = tmp_path / 'in', tmp_path / 'out'
    png(source / 'rgb.png')
    png(source / 'deep.png', noise(6, 5, 3, dtype=np.uint16))
    png(source / 'alpha.png', noise(6, 5, 4))
    png(source / 'sub' / 'gray.png', noise(6, 5, 1))
    png(source / 'one.tiff', noise(1, 1, 2, dtype=np.uint16))
    png(source / 'panorama.webp', noise(3, 300, 3))
    Image.new('CMYK', (9, 8)).save(source / 'cmyk.jpg', dpi=(200, 200))
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'lime', 'blue')]
    frames[0].save(source / 'moving.gif', save_all=True, append_images=frames[1:])
    (source / 'text.png').write_text('no picture')
    (source / 'empty.jpg').touch()
    arguments = ['upscale', '-i', str(source), '-o', str(out), '--model-path', str(weights), '-r', '--device', 'cpu']
    assert main(arguments) == 1  # two files failed, all others are there
    said = capsys.readouterr()
    assert 'text.png is not a picture' in said.err and 'empty.jpg is empty' in said.err
    assert 'CMYK converted to RGB' in said.err and 'moving.gif: first of' in said.err
    assert '8 images enlarged' in said.out and '2 failed' in said.out and 'GMACs' in said.out and 'pure' in said.out
    expected = {
        'rgb_out.png': (12, 10, 3),
        'deep_out.png': (12, 10, 3),
        'alpha_out.png': (12, 10, 4),
        'sub/gray_out.png': (12, 10, 1),
        'one_out.tiff': (2, 2, 2),
        'panorama_out.webp': (6, 600, 3),
        'cmyk_out.jpg': (16, 18, 3),
        'moving_out.png': (16, 16, 3),
    }
    found = {str(path.relative_to(out)): read_picture(path) for path in out.rglob('*') if path.is_file()}
    assert {name: picture.pixels.shape for name, picture in found.items()} == expected
    assert found['deep_out.png'].pixels.dtype == found['one_out.tiff'].pixels.dtype == np.uint16
    assert found['cmyk_out.jpg'].dpi == (200, 200)


def test_command_skips_what_exists_and_overwrites_on_demand(tmp_path, weights, capsys):
    a, b, out = png(tmp_path / 'a.png'), png(tmp_path / 'b.png'), tmp_path / 'out'
    (out / 'a_out.png').parent.mkdir()
    (out / 'a_out.png').write_text('made earlier')
    arguments = ['upscale', '-i', str(a), str(b), '-o', str(out), '--model-path', str(weights)]
    assert main(arguments) == 0
    assert (out / 'a_out.png').read_text() == 'made earlier' and read_picture(out / 'b_out.png').pixels.shape[0] == 12
    assert '1 image enlarged' in (said := capsys.readouterr().out) and '1 skipped' in said
    assert main([*arguments, '--overwrite']) == 0
    assert read_picture(out / 'a_out.png').pixels.shape == (12, 10, 3)


def test_command_with_mask_factor_and_format(tmp_path, weights, capsys):
    image = png(tmp_path / 'a.png', noise(20, 10, 4))
    code = main(
        ['upscale', '-i', str(image), '-o', str(tmp_path / 'o'), '--model-path', str(weights), '-s', '1.5', '--ext']
        + ['tiff', '--suffix', 'big', '--save-mask', '-t', '16', '--tile-overlap', '4']
    )
    assert code == 0 and 'Lanczos makes ×1.5' in capsys.readouterr().err
    assert read_picture(tmp_path / 'o' / 'a_big.tiff').pixels.shape == (30, 15, 4)
    assert read_picture(tmp_path / 'o' / 'a_big_mask.png').pixels.shape == (20, 10, 3)


def test_command_from_standard_input_to_standard_output(weights):
    file = io.BytesIO()
    Image.fromarray(noise(6, 5, 3)).save(file, 'JPEG')
    process = Process(['upscale', '-i', '-', '-o', '-', '--model-path', weights], input=file.getvalue())
    assert process.wait() == 0, process.stderr.decode()
    image = Image.open(io.BytesIO(process.stdout))
    assert image.format == 'PNG' and image.size == (10, 12)
    assert b'1 image enlarged' in process.stderr


def test_quality_and_transparency_of_jpeg(tmp_path, weights, capsys):
    image, clear = png(tmp_path / 'a.png', noise(40, 40, 3)), png(tmp_path / 'clear.png', noise(6, 5, 4))
    sizes = []
    for quality in ('20', '95'):
        target = tmp_path / f'{quality}.jpg'
        arguments = ['upscale', '-i', str(image), '-o', str(target), '--model-path', str(weights)]
        assert main([*arguments, '--quality', quality]) == 0
        sizes.append(target.stat().st_size)
    assert sizes[0] < sizes[1]
    arguments = ['upscale', '-i', str(clear), '-o', str(tmp_path), '--ext', 'jpg', '--model-path', str(weights)]
    assert main(arguments) == 1
    assert 'transparency' in capsys.readouterr().err and not (tmp_path / 'clear_out.jpg').exists()


def test_a_30000_pixel_wide_picture_into_a_jpeg_is_refused_before_the_work(tmp_path, weights, capsys):
    wide = png(tmp_path / 'wide.png', np.zeros((1, 33_000, 3), np.uint8))
    arguments = ['upscale', '-i', str(wide), '-o', str(tmp_path), '--ext', 'jpg', '--model-path', str(weights)]
    assert main(arguments) == 1
    assert 'at most 65,535' in capsys.readouterr().err


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, weights, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    image = png(tmp_path / 'a.png')
    monkeypatch.setattr(os, 'fsync', full)
    arguments = ['upscale', '-i', str(image), '-o', str(tmp_path / 'o'), '--model-path', str(weights)]
    assert main(arguments) == 1
    assert 'disk is full' in capsys.readouterr().err and os.listdir(tmp_path / 'o') == []


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_no_half_file_and_resumes(tmp_path, weights, monkeypatch, number):
    for name in 'abc':
        png(tmp_path / 'in' / f'{name}.png')
    arguments = ['upscale', '-i', str(tmp_path / 'in'), '-o', str(tmp_path / 'o'), '--model-path', str(weights)]
    run, calls = upscaler.run_network, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return run(*args)

    monkeypatch.setattr(upscaler, 'run_network', interrupted)
    assert main(arguments) == 128 + number
    assert os.listdir(tmp_path / 'o') == ['a_out.png']
    assert main(arguments) == 0 and len(calls) == 4  # b and c; a is not done again
    assert sorted(os.listdir(tmp_path / 'o')) == ['a_out.png', 'b_out.png', 'c_out.png']


class Evil:
    def __reduce__(self):
        return os.mkdir, ('executed',)


@pytest.mark.parametrize(
    'options, message',
    [
        (['--model', 'no_such_model'], 'no_such_model'),
        (['--model-path', 'nothing.pth'], 'nothing.pth'),
        (['--model-path', 'evil.pth'], 'refused'),
        (['--dtype', 'fp16', '--device', 'cpu'], 'fp16 needs a GPU'),
        (['--max-memory', 'lots'], 'amount of memory'),
        (['--arch', 'NoSuchArch'], 'NoSuchArch'),
        (['-t', '16', '--tile-overlap', '16'], 'smaller than the tile'),
    ],
)
def test_mistakes_are_sentences_with_exit_code_2(tmp_path, weights, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'evil.pth').write_bytes(pickle.dumps({'params_ema': Evil()}, protocol=2))
    png(tmp_path / 'a.png')
    own = [] if '--model-path' in options or '--model' in options else ['--model-path', str(weights)]
    assert main(['upscale', '-i', 'a.png', '-o', 'out', *own, *options]) == 2
    said = capsys.readouterr().err
    assert message in said and 'Traceback' not in said
    assert not (tmp_path / 'executed').exists() and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('factor', ['0', '-2', 'four', 'nan', 'inf', '1e-300', '9' * 400])
def test_a_wrong_factor_is_refused(capsys, factor):
    assert main(['upscale', '-i', 'a.png', '-o', 'out', '-s', factor]) == 2
    said = capsys.readouterr().err
    assert 'is not a number from 0.01 to 100' in said and len(said) < 200


def test_pure_pass_on_plain_weights_and_dense_on_ours(tmp_path, tiny, capsys):
    plain = tmp_path / 'plain.safetensors'
    save_checkpoint(plain, ATDLight(**tiny).state_dict(), {'type': 'ATDLight', **tiny})
    image = png(tmp_path / 'a.png', np.full((16, 16, 3), 90, np.uint8))
    out = ['upscale', '-i', str(image), '-o', str(tmp_path / 'o'), '--overwrite', '--model-path', str(plain)]
    assert main(out) == 0 and 'pure' not in capsys.readouterr().out
    assert main([*out, '--arch', 'PPATDLight']) == 0 and '100.0% of the pixels pure' in capsys.readouterr().out
    assert main([*out, '--arch', 'PPATDLight', '--no-pure-pass']) == 0 and 'pure' not in capsys.readouterr().out
