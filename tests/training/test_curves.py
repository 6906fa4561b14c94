"""Curves of trainings, read from the logs that a training really writes."""

import numpy as np
import pytest
from tiny_training import options, write_options, write_pairs

from ppsr.cli import main
from ppsr.training import curves

LOG = """\
2026-01-01 00:00:00,000 INFO:
  train:[
    total_iter: 1100
  ]
  val:[
    val_freq: 500
  ]
2026-01-01 00:01:00,000 INFO: [run..][epoch:  0, iter:     490, lr:(1.0e-04,)] [eta: 0:00:02, time (data): 0.1 (0.0)] \
l_pix: 5.0e-02 l_flat: nan grad_norm: 1.0e+00\x20
2026-01-01 00:02:00,000 INFO: Validation Set5
\t # psnr: 30.5000\tBest: 30.5000 @ 500 iter
\t # gmacs: 1.0000\tBest: 1.0000 @ 500 iter

2026-01-01 00:03:00,000 INFO: [run..][epoch:  3, iter:   1,095, lr:(1.0e-04,)] [eta: 0:00:02, time (data): 0.1 (0.0)] \
l_pix: 4.0e-02\x20
2026-01-01 00:04:00,000 INFO: Validation Set5
\t # psnr: 30.4000\tBest: 30.5000 @ 500 iter
"""


pytestmark = pytest.mark.usefixtures('one_thread')


def test_what_a_training_writes_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path, 3)
    opt = options(tmp_path, train__total_iter=4, val__val_freq=2, logger__print_freq=1, logger__save_checkpoint_freq=3)
    opt['train']['flat_opt'] = {'sides': [8, 8], 'pixels': 64}
    write_options(tmp_path, opt)
    assert main(['train', '-opt', 'options.yml']) == 0
    found = curves.read_training(tmp_path / 'experiments/run')
    assert list(found.losses) == ['l_pix', 'l_flat']
    assert all(list(points) == [1, 2, 3, 4] and min(points.values()) > 0 for points in found.losses.values())
    assert list(found.metrics['psnr', 'val']) == [2, 4]
    assert 'gmacs_saved_percent' in {metric for metric, _ in found.metrics}
    output = tmp_path / 'curves.png'
    monkeypatch.setattr('sys.argv', ['curves', str(tmp_path / 'experiments/run'), '-o', str(output)])
    curves.main()
    assert output.read_bytes().startswith(b'\x89PNG')


def test_iterations_of_validations_are_worked_out(tmp_path):
    (tmp_path / 'x.log').write_text(LOG)
    found = curves.read_log(tmp_path / 'x.log')
    assert found.losses['l_pix'] == {490: 0.05, 1095: 0.04} and np.isnan(found.losses['l_flat'][490])
    assert found.metrics['psnr', 'Set5'] == {500: 30.5, 1100: 30.4}  # the last one is at the end, not at 1500
    assert found.metrics['gmacs', 'Set5'] == {500: 1.0}


def test_a_training_that_went_on_is_one_curve(tmp_path):
    later = LOG.replace('iter:     490', 'iter:     501').replace('5.0e-02', '6.0e-02').replace('30.5000', '30.6000')
    (tmp_path / 'train_run_20260102_000000.log').write_text(later)
    (tmp_path / 'train_run_20260101_235959.log').write_text(LOG)
    found = curves.read_training(tmp_path)
    assert found.losses['l_pix'] == {490: 0.05, 501: 0.06, 1095: 0.04}
    assert found.metrics['psnr', 'Set5'] == {500: 30.5, 1000: 30.6, 1100: 30.4}


def test_panels_of_metrics_and_losses(tmp_path):
    (tmp_path / 'x.log').write_text(LOG)
    found = curves.read_log(tmp_path / 'x.log')
    figure = curves.draw({'one': found, 'other': found}, metrics=['psnr', 'gmacs'])
    assert [axis.get_title() for axis in figure.axes] == ['Set5 psnr', 'Set5 gmacs', 'l_pix', 'l_flat']
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['one', 'other']
    low, high = figure.axes[0].get_ylim()
    assert high - low == pytest.approx(0.01 * 30.45, rel=1e-3) and low < 30.4 and high > 30.5
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [500, 1100] and line.get_ydata().tolist() == [30.5, 30.4]


def test_losses_are_smoothed_by_a_running_mean():
    values = np.arange(200.0) ** 2
    smooth = curves._running_mean(values)
    assert smooth[100] == pytest.approx(values[95:106].mean()) and smooth[0] == pytest.approx(values[:6].mean())


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['nothing.log', '-o', 'a.png'], 'nothing.log: the log cannot be read (No such file or directory)'),
        (['empty', '-o', 'a.png'], 'empty: no log here tells of an iteration'),
        (['x.log', '-o', 'a.jpg'], 'a.jpg: a plot is written as .png, .pdf, .svg'),
        (['x.log', '-o', 'no/a.png'], 'no/a.png: cannot be written (No such file or directory)'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_mistakes_are_a_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'x.log').write_text(LOG)
    (tmp_path / 'empty').mkdir()
    monkeypatch.setattr('sys.argv', ['curves', *arguments])
    with pytest.raises(SystemExit) as e:
        curves.main()
    assert e.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.glob('*.png'))
