"""A stand-in in closed form, the curve of a weight file, and the dial that chooses from it."""

import json
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image
from support import TINY

from ppsr.archs import ATDLight, CAMixerATDLight, PPATDLight, SwinIRLight
from ppsr.archs.window_compensation import mean5
from ppsr.calibration import Curve, Point, Wish, choose, curve_of
from ppsr.calibration.measure import calibrate
from ppsr.calibration.stand_in import fit_stand_ins
from ppsr.cli import main
from ppsr.data.benchmark import read_pair
from ppsr.errors import UserError
from ppsr.masks import build_mask
from ppsr.metrics import psnr
from ppsr.pictures.upscaler import Upscaler
from ppsr.weights import load_model, read_checkpoint, save_checkpoint

BOTH = ['category', 'window']
SMALL = TINY | {'depths': [2], 'num_heads': [2]}


def pictures(folder, count=6, size=64):
    """Half of each is flat, half noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        image[: size // 2] = 40 * i
        Image.fromarray(image).save(folder / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp('data') / 'Halves' / 'HR').parent


@pytest.fixture(scope='module')
def dense_weights(tmp_path_factory):
    torch.manual_seed(0)
    net = ATDLight(**SMALL)
    for p in net.parameters():  # attention that gives more than noise around zero
        p.data *= 3
    path = tmp_path_factory.mktemp('weights') / 'dense.safetensors'
    save_checkpoint(path, net.state_dict(), {'type': 'ATDLight', **SMALL}, {'summary': 'tiny'})
    return path


@pytest.fixture(scope='module')
def calibrated(data, dense_weights):
    path = dense_weights.with_name('calibrated.safetensors')
    curve, fitted = calibrate(dense_weights, data, path, thresholds=[0.05, 0.2])
    assert fitted
    return path, curve


def test_a_network_with_window_attention_alone(data, tmp_path):
    sizes = dict(upscale=2, embed_dim=16, depths=[2], num_heads=[2])
    save_checkpoint(tmp_path / 'dense.pth', SwinIRLight(**sizes).state_dict())
    curve, fitted = calibrate(tmp_path / 'dense.pth', data, tmp_path / 'out.safetensors', thresholds=[0.05])
    assert fitted and {point.scope for point in curve.points} == {('window',)} and len(curve.points) == 2
    upscaler = Upscaler.from_pretrained(tmp_path / 'out.safetensors', max_loss=10, device='cpu')
    upscaler(np.full((16, 16, 3), 90, np.uint8))
    assert upscaler.stats.pure_share == 1 and upscaler.stats.saved_share > 0


# ------------------------------------------------------------------------------------------------------- the stand-in


def test_every_layer_is_fitted_to_what_the_compensated_ones_before_give():
    torch.manual_seed(0)
    net = PPATDLight(**SMALL, pp_scope=BOTH).double().eval()
    lq = torch.rand(8, 3, 16, 24, dtype=torch.float64)
    lq[..., :16] = lq[..., :1, :1]
    mask = build_mask('variance')
    fit_stand_ins(net, lq, mask, ridge=1e-14)
    pure, inputs = mask(lq), []
    assert 0.3 < pure.double().mean() < 0.9
    layers = net.exempting_layers()
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad(), net.exempting(mask, BOTH):
        net(lq)
    for layer, x in zip(layers, inputs):
        with torch.no_grad():
            z, attention = layer.window_example(x)
        rows = torch.cat([z, mean5(z), torch.ones_like(z[..., :1])], -1)[pure]
        best = torch.linalg.lstsq(rows, attention[pure]).solution
        error, least = (
            (rows @ s - attention[pure]).square().sum()
            for s in (
                torch.cat([layer.comp.weight.T, layer.comp.bias[None]]),
                best,
            )
        )
        assert error <= least * (1 + 1e-6) and least < attention[pure].square().sum()
    assert net.pure_pass.name == 'colour'  # as before


def test_with_few_pure_tokens_all_are_fitted_to():
    nets = [PPATDLight(**SMALL, pp_scope=BOTH).eval() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    lq = torch.rand(2, 3, 16, 24)
    fit_stand_ins(nets[0], lq, build_mask('variance', threshold=1e-6))
    fit_stand_ins(nets[1], lq, build_mask('variance', threshold=1e-5))
    assert torch.equal(nets[0].exempting_layers()[0].comp.weight, nets[1].exempting_layers()[0].comp.weight)
    assert nets[0].exempting_layers()[0].comp.bias.any()
    with pytest.raises(ValueError, match='whole windows'):
        fit_stand_ins(nets[0], torch.rand(1, 3, 15, 16), build_mask('variance'))


# ---------------------------------------------------------------------------------------------------------- the curve


def test_the_curve_is_what_the_settings_do(calibrated, dense_weights, data):
    path, curve = calibrated
    assert curve == curve_of(read_checkpoint(path)) and curve.images == 6 and curve.data == 'Halves'
    assert len(curve.points) == 6 and {p.scope for p in curve.points} == {('category',), tuple(BOTH)}
    for point in curve.points:
        nets = load_model(dense_weights), load_model(path, settings=point.settings)
        losses, saved = [], []
        for image in sorted((data / 'HR').iterdir()):
            lq, gt = read_pair(image, 2)
            results = [Upscaler(net, device='cpu').upscale_with_stats(lq) for net in nets]
            before, after = (psnr(result, gt, 2) for result, _ in results)
            losses.append(before - after)
            saved.append(results[1][1].saved_share)
        assert point.losses == pytest.approx(losses, abs=2e-5)
        assert point.saved == pytest.approx(mean(saved), abs=2e-5)
    window = max(curve.points, key=lambda p: p.saved)
    assert window.scope == tuple(BOTH) and window.saved > 0.1


def test_files_stay_what_they_were_for_those_who_ask_for_nothing(calibrated, dense_weights):
    path = calibrated[0]
    net, checkpoint = load_model(path), read_checkpoint(path)
    assert isinstance(net, PPATDLight) and net.exempting_layers()[0].scope == ('category',)
    assert checkpoint.facts['summary'] == 'tiny' and 'closed form' in checkpoint.facts['stand_in']
    dense = read_checkpoint(dense_weights).state_dict
    assert all(torch.equal(checkpoint.state_dict[name], value) for name, value in dense.items())


def test_what_cannot_be_written_is_known_before_anything_is_computed(dense_weights, data, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    (tmp_path / 'folder.safetensors').mkdir()
    monkeypatch.setattr('ppsr.calibration.measure.fit_stand_ins', lambda *_: pytest.fail('computed'))
    for output in (tmp_path / 'file' / 'x.safetensors', tmp_path / 'folder.safetensors'):
        with pytest.raises(UserError, match='cannot be written'):
            calibrate(dense_weights, data, output, 5, [0.1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'folder.safetensors']


def test_a_stand_in_that_is_there_stays_unless_asked(calibrated, data, tmp_path):
    path, again, refitted = calibrated[0], tmp_path / 'again.safetensors', tmp_path / 'refitted.safetensors'
    state = read_checkpoint(path).state_dict
    name = next(name for name in state if name.endswith('comp.bias'))
    save_checkpoint(tmp_path / 'trained.pth', state | {name: state[name] + 1})
    assert calibrate(tmp_path / 'trained.pth', data, again, 5, [0.1])[1] is False
    assert calibrate(tmp_path / 'trained.pth', data, refitted, 5, [0.1], refit=True)[1] is True
    assert torch.equal(read_checkpoint(again).state_dict[name], state[name] + 1)
    assert not torch.equal(read_checkpoint(refitted).state_dict[name], state[name] + 1)
    assert load_model(again).exempting_layers()[0].scope == ('category',)  # a .pth does not say; the paper's


def test_without_ground_truth_losses_are_estimated(dense_weights, data, tmp_path):
    curve, _ = calibrate(dense_weights, data / 'HR', tmp_path / 'x.safetensors', 5, [0.1], ground_truth=False)
    assert curve.against == 'dense output' and all(loss >= 0 for point in curve.points for loss in point.losses)
    assert any(point.loss > 0 for point in curve.points)
    assert 'estimated' in str(choose(Wish(saving=0), curve))


# ----------------------------------------------------------------------------------------------------------- the dial


CURVE = Curve(
    'Some',
    'ground truth',
    tuple(
        Point(scope, mask, threshold, losses, saved)
        for scope, mask, threshold, losses, saved in [
            (('category',), 'colour', None, (0.0, 0.01, 0.0, 0.01), 0.08),
            (('category',), 'variance', 0.01, (-0.01, -0.01, -0.01, -0.01), -0.001),
            (('category', 'window'), 'variance', 0.05, (0.0, 0.0, 0.0, 0.06), 0.15),
            (('category', 'window'), 'variance', 0.1, (0.04, 0.05, 0.05, 0.06), 0.25),
            (('category', 'window'), 'colour', None, (0.1, 0.3, 0.1, 0.1), 0.25),
        ]
    ),
)


@pytest.mark.parametrize(
    ('wish', 'chosen'),
    [
        (dict(max_loss=0.0), None),  # what saves nothing is worse than dense
        (dict(max_loss=0.005), 0),
        (dict(max_loss=0.02), 2),
        (dict(max_loss='0.02@75'), 2),
        (dict(max_loss='0.02@100'), 0),
        (dict(max_loss='0.05@75'), 3),
        (dict(max_loss='0.05@76'), 0),
        (dict(max_loss=1), 3),
        (dict(saving=0), 0),
        (dict(saving=8.1), 2),
        (dict(saving=25), 3),
        (dict(exact=True), None),
    ],
    ids=str,
)
def test_choice(wish, chosen):
    wish = Wish.of(**wish)
    choice = choose(wish, CURVE)
    assert choice.point == (None if chosen is None else CURVE.points[chosen])
    assert str(wish) in str(choice) and '\n' not in str(choice)
    assert ('dense' in str(choice)) == (chosen is None)
    assert 'losses' not in repr(choice) and len(repr(choice)) < 500  # part of what `print(upscaler.stats)` shows


@pytest.mark.parametrize(
    ('wish', 'message'),
    [
        (dict(max_loss=0.1, saving=3), 'max_loss and saving are two wishes'),
        (dict(saving=3, exact=True), 'saving and exact are two wishes'),
        *(
            (dict(max_loss=x), 'max_loss must be a number from 0 to 10 dB')
            for x in (-1, 11, '', 'x', '1@', 'nan', True, '1@0', '1@101', '1@2@3')
        ),
        *((dict(saving=x), 'saving must be a number from 0 to 100') for x in (-1, 101, float('nan'), 'x')),
    ],
    ids=str,
)
def test_wishes_that_make_no_sense(wish, message):
    with pytest.raises(UserError, match=message):
        Wish.of(**wish)


def test_more_than_was_measured_is_not_promised():
    with pytest.raises(UserError, match=r'no setting that was measured saves 26 %; the most is 25.0%'):
        choose(Wish.of(saving=26), CURVE)


@pytest.fixture
def dialled(calibrated, tmp_path):
    """The calibrated weights with another curve."""
    checkpoint = read_checkpoint(calibrated[0])
    path = tmp_path / 'dialled.safetensors'
    save_checkpoint(path, checkpoint.state_dict, checkpoint.config, {'calibration': CURVE.as_fact()})
    return path


def test_the_upscaler_runs_what_was_chosen(dialled, data):
    lq = read_pair(data / 'HR/1.png', 2)[0]
    settings = {'pp_mask': 'variance', 'pp_threshold': 0.05, 'pp_scope': BOTH}
    for dial, same in (
        (dict(max_loss=0.02), dict(settings=settings)),
        (dict(saving=1), dict()),
        (dict(exact=True), dict(pure_pass=False)),
    ):
        upscaler = Upscaler.from_pretrained(dialled, device='cpu', **dial)
        result, stats = upscaler.upscale_with_stats(lq)
        expected, other = Upscaler.from_pretrained(dialled, device='cpu', **same).upscale_with_stats(lq)
        assert np.array_equal(result, expected) and stats.saved_share == other.saved_share
        assert stats.choice == upscaler.choice == choose(Wish.of(**dial), CURVE) and other.choice is None
    assert stats.saved_share == 0


def test_the_command_says_what_was_asked_chosen_and_saved(dialled, data, tmp_path, capsys):
    arguments = ['upscale', '-i', str(data / 'HR/1.png'), '-o', str(tmp_path / 'out'), '--model-path', str(dialled)]
    assert main([*arguments, '--max-loss', '0.05@75', '--device', 'cpu']) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == (
        'Asked: at most 0.05 dB lost on 75 % of the images. Chosen: mask variance below 0.1, category and window '
        'attention exempt. Mean over 4 images (Some): 0.0500 dB lost, at most 0.0500 dB on 75 % of them; 25.0% of the '
        'multiply-adds saved.'
    )
    assert 'saved by Pure-Pass' in out


# ---------------------------------------------------------------------------------------------------------- bad input


def test_the_command_calibrates(dense_weights, data, tmp_path, capsys):
    target = tmp_path / 'x.safetensors'
    arguments = ['-n', str(dense_weights), '--data', str(data), '-o', str(target), '--device', 'cpu', '--images', '5']
    assert main(['calibrate', *arguments, '--thresholds', '0.1']) == 0
    out = capsys.readouterr().out
    assert 'category + window  gradient' in out and '5 images of Halves, against ground truth' in out
    assert curve_of(read_checkpoint(target)).images == 5


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--thresholds', '0'], 'is not a number from 1e-06 to 2'),
        (['--thresholds', '3'], 'is not a number from 1e-06 to 2'),
        (['--images', '4'], 'is not a whole number from 5'),
        (['--data', 'empty'], 'No images in empty'),
        (['--data', 'few'], 'few: holds 4 images, and a curve takes 5 or more'),
        (['--data', 'missing'], 'missing'),
        (['-o', 'x.pth'], 'the curve is kept in .safetensors'),
        (['-o', 'few/0.png/x.safetensors'], 'cannot be written'),
        (['-n', 'camixer.safetensors'], 'CAMixerATDLight has no window attention'),
        (['-n', 'nobody'], 'no such weight file'),
        (['--data', 'tiny'], 'has less than 8×8 input pixels'),
    ],
    ids=str,
)
def test_what_cannot_be_calibrated_is_one_sentence(
    options, message, dense_weights, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    pictures(tmp_path / 'few', 4, 16)
    pictures(tmp_path / 'tiny', 5, 12)
    camixer = CAMixerATDLight(**SMALL)
    save_checkpoint('camixer.safetensors', camixer.state_dict(), {'type': 'CAMixerATDLight', **SMALL})
    given = {'-n': str(dense_weights), '--data': str(data), '-o': 'x.safetensors'}
    given |= dict(zip(options[::2], options[1::2]))
    before = sorted(tmp_path.rglob('*'))
    try:
        code = main(['calibrate', *(word for pair in given.items() for word in pair), '--device', 'cpu'])
    except SystemExit as e:  # a typo
        code = e.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count('\n') == 1
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
    ('dial', 'message'),
    [
        (dict(max_loss=0.1), 'has no curve to choose a setting from; measure one with ppsr calibrate'),
        (dict(saving=5), 'has no curve'),
        (dict(max_loss=0.1, pure_pass=False), 'max_loss chooses what is exempt, and so does no Pure-Pass'),
        (dict(exact=True, settings={'pp_threshold': 0.1}), 'exact chooses what is exempt, and so does threshold'),
        (dict(saving=1, settings={'pp_window_compensation': 'value'}), 'and so does window_compensation'),
    ],
    ids=str,
)
def test_dials_that_cannot_be_followed(dial, message, dense_weights):
    with pytest.raises(UserError, match=message):
        Upscaler.from_pretrained(dense_weights, device='cpu', **dial)
    assert Upscaler.from_pretrained(dense_weights, device='cpu', exact=True).choice.point is None


FACT = CURVE.as_fact()
POINT = FACT['points'][0]


@pytest.mark.parametrize(
    'fact',
    [
        'x',
        [],
        {},
        FACT | {'points': []},
        FACT | {'points': 'x'},
        FACT | {'points': [3]},
        FACT | {'points': [POINT | {'losses': []}]},
        FACT | {'points': [POINT | {'losses': [1e999]}]},
        FACT | {'points': [POINT | {'losses': ['0']}]},
        FACT | {'points': [POINT | {'losses': [0.1]}, POINT]},
        FACT | {'points': [POINT | {'saved': 2}]},
        FACT | {'points': [POINT | {'scope': ['colour']}]},
        FACT | {'points': [POINT | {'mask': 'os.system'}]},
        FACT | {'points': [POINT | {'mask': 'variance'}]},
        FACT | {'points': [POINT | {'threshold': 0.1}]},
        FACT | {'points': [POINT | {'code': 1}]},
        FACT | {'points': [POINT | {'mask': 'variance', 'threshold': -1}]},
        FACT | {'against': 'hearsay'},
        FACT | {'data': 3},
        FACT | {'data': '\x1b[2J'},
        FACT | {'more': 3},
    ],
    ids=lambda fact: str(fact)[-60:],
)
def test_curves_are_other_peoples(fact, dialled):
    checkpoint = replace(read_checkpoint(dialled), facts={'calibration': json.loads(json.dumps(fact))})
    with pytest.raises(UserError) as e:
        curve_of(checkpoint)
    assert str(dialled) in str(e.value) and '\n' not in str(e.value)
