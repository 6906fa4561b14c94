"""ppsr export, from a weight file to a file that other runtimes run."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from support import TINY

from ppsr.archs import CAMixerATDLight, PPATDLight, SwinIRLight
from ppsr.calibration.curve import Curve, Point
from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.weights import save_checkpoint

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')

from ppsr.export.check import check, settings_of  # noqa: E402
from ppsr.export.files import rounded_to_half  # noqa: E402
from ppsr.export.onnx_file import export_onnx  # noqa: E402

CONFIG = TINY | dict(depths=[2], num_heads=[2], pp_scope=['category', 'window'], pp_window_compensation='mean')


def lively(net):
    """With weights that are not those of the start, so that every part counts."""
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.eval()


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A network, its weight file, and its ONNX file with float16 weights, made and checked by the command."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('export')
    net = lively(PPATDLight(**CONFIG))
    save_checkpoint(folder / 'x.safetensors', net.state_dict(), {'type': 'PPATDLight', **CONFIG})
    assert main(['export', '--model-path', str(folder / 'x.safetensors'), '-o', str(folder / 'x.onnx'), '--fp16']) == 0
    return net, folder


def test_equal_on_sizes_that_were_not_seen(exported):
    net, folder = exported
    comparisons = list(check(folder / 'x.onnx', rounded_to_half(net)))
    assert len(comparisons) >= 4
    for comparison in comparisons:
        assert comparison.good and comparison.error < 1e-4 and comparison.flips is not None, str(comparison)
    assert {c.pure for c in comparisons} >= {1.0} and any(0 < c.pure < 1 for c in comparisons)
    other = lively(PPATDLight(**CONFIG))
    assert not all(c.good for c in check(folder / 'x.onnx', other, sizes=[(1, 9, 9)]))


def test_what_the_file_says(exported):
    net, folder = exported
    model = onnx.load(folder / 'x.onnx')
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        'ppsr.config': json.dumps(net.configuration),
        'ppsr.scale': '2',
        'ppsr.multiple': '8',
        'ppsr.mask': repr(net.pure_pass),
    }
    assert settings_of(folder / 'x.onnx') == net.configuration
    assert {d.domain for d in model.opset_import} == {''} and not model.functions
    assert sys.prefix not in str(model) and 'site-packages' not in str(model)  # nothing of this machine
    halves = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    stored = sum(onnx.numpy_helper.to_array(t).size for t in halves)
    assert stored > 0.9 * sum(p.numel() for p in net.parameters())
    session = onnxruntime.InferenceSession(str(folder / 'x.onnx'), providers=['CPUExecutionProvider'])
    (given,), (got,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ('lq', ['batch', 3, 'height', 'width'])
    assert (got.name, got.shape) == ('sr', ['batch', 3, 'sr_height', 'sr_width'])


def test_pure_groups_are_not_computed(exported, tmp_path):
    """The rows that reach category attention's softmax, counted in ONNX Runtime: ⌈active / 16⌉ groups of 16."""
    net, folder = exported
    model = onnx.load(folder / 'x.onnx')
    softmax = [node for node in model.graph.node if node.op_type == 'Softmax']
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(node.output[0]) for node in softmax)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    lq = torch.rand(1, 3, 24, 24)
    lq[..., :16] = 0.5
    with torch.inference_mode():
        mask = net(lq, return_mask=True)[1]
    active = int((~mask).sum())
    assert 16 < active < 24 * 24 - 100
    shapes = [out.shape for out in session.run(None, {'lq': lq.numpy()})[1:]]
    groups = [shape[0] for shape in shapes if shape[2:] == (16, 16)]
    assert groups == [-(-active // 16)] * 2


def test_check_says_what_it_found(tmp_path, capsys):
    """A dense network, which pads in another way, and the exit code."""
    config = dict(upscale=2, embed_dim=16, depths=[1], num_heads=[2], window_size=8)
    net = lively(SwinIRLight(**config))
    save_checkpoint(tmp_path / 'x.safetensors', net.state_dict(), {'type': 'SwinIRLight', **config})
    words = ['export', '--model-path', str(tmp_path / 'x.safetensors'), '-o', str(tmp_path / 'x.onnx')]
    assert main([*words, '--check']) == 0
    said = capsys.readouterr().out
    assert 'ONNX Runtime' in said and 'Equal to 0.0001' in said
    before = (tmp_path / 'x.onnx').stat()
    assert main(words) == 2 and 'exists already' in capsys.readouterr().err
    assert main([*words, '--check']) == 0 and capsys.readouterr().out.startswith('ONNX Runtime')  # not made again
    assert (tmp_path / 'x.onnx').stat() == before


def test_check_of_the_file_of_another_network(exported, tmp_path, capsys):
    """Float16 weights are known from the file; other settings, other weights, and what is no file of ours."""
    net, folder = exported

    def check_command(weights, file, *words):
        code = main(['export', '--model-path', str(weights), '-o', str(file), '--check', *words])
        return code, ''.join(capsys.readouterr())

    code, said = check_command(folder / 'x.safetensors', folder / 'x.onnx')
    assert code == 0 and 'Equal' in said
    code, said = check_command(folder / 'x.safetensors', folder / 'x.onnx', '--no-pure-pass')
    assert code == 2 and "(type is 'PPATDLight' there, and 'ATDLight' in the weights named)" in said
    config = {'type': 'PPATDLight', **CONFIG}
    save_checkpoint(tmp_path / 'y.safetensors', lively(PPATDLight(**CONFIG)).state_dict(), config)
    code, said = check_command(tmp_path / 'y.safetensors', folder / 'x.onnx')
    assert code == 1 and 'NOT equal' in said
    (tmp_path / 'z.onnx').write_bytes(b'nothing')
    code, said = check_command(folder / 'x.safetensors', tmp_path / 'z.onnx')
    assert code == 2 and 'z.onnx: cannot be read as an ONNX file' in said


def test_the_dial(tmp_path, monkeypatch, capsys):
    """What is exported has the setting that was chosen, and the command says which."""
    point = Point(('category', 'window'), 'gradient', 0.1, (0.01,), 0.2)
    facts = {'calibration': Curve('Some', 'ground truth', (point,)).as_fact()}
    path, made = tmp_path / 'x.safetensors', tmp_path / 'x.onnx'
    net = PPATDLight(**CONFIG | {'pp_window_compensation': 'linear'})
    save_checkpoint(path, net.state_dict(), net.configuration, facts)
    exported = []
    monkeypatch.setattr('ppsr.export.onnx_file.export_onnx', lambda net, path, half: exported.append(net))
    made.touch()
    words = ['export', '--model-path', str(path), '-o', str(made), '--overwrite']
    assert main([*words, '--max-loss', '0.02']) == 0
    assert 'Chosen: mask gradient below 0.1' in capsys.readouterr().err
    found = exported[0].configuration
    assert {name: found[name] for name in point.settings} == point.settings
    assert main([*words, '--exact']) == 0 and exported[1].pure_pass is None
    assert main([*words, '--saving', '30']) == 2
    assert 'no setting that was measured saves 30 %' in capsys.readouterr().err


def test_what_cannot_be_written_is_said_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('ppsr.export.onnx_file.onnx_model', lambda *_: pytest.fail('work before the mistake'))
    (tmp_path / 'file').touch()
    (tmp_path / 'folder.onnx').mkdir()
    for target in ('file/x.onnx', 'folder.onnx'):
        assert main(['export', '-n', 'PPATDLight_x4', '-o', str(tmp_path / target), '--overwrite']) == 2
        assert f'{target}: cannot be written' in capsys.readouterr().err


def test_what_cannot_be_exported_is_said(tmp_path):
    small = dict(TINY, depths=[1], num_heads=[2])
    with pytest.raises(UserError, match="mask 'dynamic' cannot be exported; .* colour, gradient, variance and both"):
        export_onnx(PPATDLight(**small, pp_mask='dynamic'), tmp_path / 'x.onnx')
    with pytest.raises(UserError, match='CAMixerATDLight cannot be exported: torch.onnx says'):
        export_onnx(CAMixerATDLight(**small), tmp_path / 'x.onnx')
    assert not list(tmp_path.iterdir())


def test_executorch(tmp_path, capsys):
    """Where it is installed; it is large, and not among the packages for testing."""
    pytest.importorskip('executorch.exir')
    config = dict(CONFIG, pp_scope=['category'])
    path, program = tmp_path / 'x.safetensors', tmp_path / 'x.pte'
    save_checkpoint(path, lively(PPATDLight(**config)).state_dict(), {'type': 'PPATDLight', **config})
    assert main(['export', '--model-path', str(path), '-o', str(program), '--size', '21', '13', '--check']) == 0
    assert 'ExecuTorch' in (said := capsys.readouterr().out) and 'Equal' in said


def test_ties_in_each_picture_leave_the_check_undecided(capsys):
    """One picture without them decides; what is more than a tie is an error."""
    from ppsr.cli.export import _report

    def found(error, good=True):
        return SimpleNamespace(error=error, good=good)

    for comparisons, code, said in (
        ([found(1e-3), found(1e-6)], 0, 'Equal to'),
        ([found(1e-3), found(1e-3)], 1, 'Not decided'),
        ([found(1e-6), found(1, good=False)], 1, 'NOT equal'),
    ):
        assert _report(comparisons) == code
        assert capsys.readouterr().out.splitlines()[-1].startswith(said)


@pytest.mark.parametrize('sides', [(13, 21), (16, 24)], ids=['cropped', 'whole'])
def test_the_program_for_one_size_is_the_network(sides):
    """What ExecuTorch is given: PyTorch's operators alone, the same result."""
    from ppsr.export.executorch_file import fixed_program

    net = lively(PPATDLight(**CONFIG))
    program = fixed_program(net, *sides)
    assert not any('ppsr' in str(node.target) or 'alias' in str(node.target) for node in program.graph.nodes)
    lq = torch.rand(1, 3, *sides)
    lq[..., :9] = 0.5
    with torch.no_grad():
        torch.testing.assert_close(program.module()(lq), net(lq), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'words, message',
    [
        (['-o', 'x.pth'], 'a file of onnx is called .onnx'),
        (['-o', 'x.onnx', '--size', '8', '8'], '--size is for ExecuTorch'),
        (['-o', 'x.pte'], 'needs --size'),
        (['-o', 'x.pte', '--size', '8', '8', '--fp16'], 'float32'),
    ],
    ids=str,
)
def test_wrong_words(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(['export', '-n', 'PPATDLight_x4', *words]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    assert main(['export', '-n', 'PPATDLight_x4', '-o', str(tmp_path / 'x.onnx')]) == 2
    assert "pip install 'ppsr[export]'" in capsys.readouterr().err and not list(tmp_path.iterdir())
