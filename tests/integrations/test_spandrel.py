import pytest
import torch
from support import TINY

from ppsr.archs import ATDLight, ATDLightV2, PPATDLight, PPATDLightV2, PPSwinIRLight
from ppsr.errors import UserError
from ppsr.weights import load_model, save_checkpoint

spandrel = pytest.importorskip('spandrel')
from ppsr.integrations.spandrel import install, load  # noqa: E402

SMALL = TINY | dict(category_size=128)  # leaves no trace in the parameters, and is taken as published


@pytest.fixture
def registry():
    registry = spandrel.MAIN_REGISTRY.copy()
    assert 'PPATDLight' in install(registry)
    assert install(registry) == []  # a second time
    return registry


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('arch', [ATDLight, PPATDLight])
def test_a_program_with_spandrel_gets_pure_pass(tmp_path, registry, arch, suffix):
    net = arch(**SMALL).eval()
    save_checkpoint(tmp_path / f'x{suffix}', net.state_dict(), {'type': arch.__name__, **SMALL})
    model = spandrel.ModelLoader('cpu', registry).load_from_file(tmp_path / f'x{suffix}')
    assert isinstance(model, spandrel.ImageModelDescriptor) and isinstance(model.model, PPATDLight)
    assert (model.architecture.id, model.scale, model.purpose) == ('PPATDLight', 2, 'SR')
    assert model.supports_half and model.supports_bfloat16 and model.tiling is spandrel.ModelTiling.SUPPORTED
    lq = torch.rand(1, 3, 11, 5)
    lq[..., :3] = 0.5
    ours = load_model(tmp_path / f'x{suffix}', arch='PPATDLight')
    with torch.inference_mode():
        expected, mask = ours(lq, return_mask=True)
    assert mask.any()
    assert torch.equal(model(lq), expected.clamp(0, 1))
    half = model.half()(lq.half())
    assert half.dtype == torch.float16 and half.isfinite().all()


def test_other_weights_stay_spandrels(registry):
    from spandrel.architectures.ATD import ATD

    loader = spandrel.ModelLoader('cpu', registry)
    large = ATD(embed_dim=16, depths=(2,), num_heads=(2,), window_size=8, upsampler='pixelshuffle', upscale=2)
    assert loader.load_from_state_dict(large.state_dict()).architecture.id == 'ATD'
    with pytest.raises(spandrel.UnsupportedModelError):
        loader.load_from_state_dict({'weight': torch.zeros(1)})
    damaged = PPATDLight(**SMALL).state_dict()
    damaged['norm.weight'] = damaged['norm.weight'][:1]
    with pytest.raises(Exception, match='loading state_dict for ATD:\n.*norm.weight'):  # spandrel's ATD says it
        loader.load_from_state_dict(damaged)


def test_the_second_version(registry):
    """Which spandrel does not know by itself."""
    state = ATDLightV2(**SMALL).state_dict()
    with pytest.raises(spandrel.UnsupportedModelError):
        spandrel.ModelLoader().load_from_state_dict(dict(state))
    model = spandrel.ModelLoader('cpu', registry).load_from_state_dict(state)
    assert model.architecture.id == 'PPATDLightV2' and type(model.model) is PPATDLightV2


def test_swinir_light_is_taken_where_it_has_learned_to_do_without_attention(registry):
    small = dict(upscale=2, embed_dim=16, depths=[2], num_heads=[2], window_size=8)
    ours, order = registry['PPSwinIRLight'], [str(a.architecture.id) for a in registry.architectures('detection')]
    assert ours.detect(PPSwinIRLight(**small, pp_window_compensation='linear').state_dict())
    assert not ours.detect(PPSwinIRLight(**small).state_dict())
    assert order.index('PPSwinIRLight') < order.index('SwinIR') and order.index('PPATDLight') < order.index('ATD')


def test_dense(registry):
    other = spandrel.ArchRegistry()
    install(other, pure_pass=False)
    state = PPATDLight(**SMALL).state_dict()
    assert spandrel.ModelLoader('cpu', other).load_from_state_dict(state).model.pure_pass is None


def test_settings_of_a_file_are_kept(tmp_path):
    config = {'type': 'PPATDLight', **TINY, 'pp_num_centers': 3}
    save_checkpoint(tmp_path / 'x.safetensors', PPATDLight(**TINY).state_dict(), config)
    net = load(tmp_path / 'x.safetensors').model
    assert net.pure_pass.num_centers == 3 and net.layers[0].residual_group.layers[0].attn_aca.category_size == 16
    save_checkpoint(tmp_path / 'x.pth', PPATDLight(**TINY).state_dict())
    assert isinstance(load(tmp_path / 'x.pth').model, PPATDLight)
    assert load('PPATDLight_x2', pure_pass=False).tags == ['ATD-light', '48dim', 'dense']
    with pytest.raises(UserError, match='no such weight file'):
        load(tmp_path / 'nothing.pth')
