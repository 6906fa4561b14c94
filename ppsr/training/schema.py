"""The options of a training or a test, declared: types, ranges, defaults and meaning of every key in one line each.

Add a key where it belongs, as ``name: Annotated[type, kind, 'what it does'] = default`` (:mod:`ppsr.schema` has the
kinds), read it in the code, and write the docs anew with ``python -m ppsr.training.document``. A new optimizer,
scheduler, loss, metric or data set is a section of its own, entered in the mapping that follows its kin; the arguments
of a network are those of its constructor, with their ranges in :mod:`ppsr.archs.settings`.

Sections called Open… are those of models of other packages: what the training loop reads is declared, the rest is
handed on to the model as it is.
"""

from typing import Annotated, Any

from basicsr.archs.vgg_arch import NAMES as VGG
from basicsr.utils.registry import DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY

from ppsr.errors import UserError
from ppsr.registry import registered
from ppsr.schema import (
    Choice,
    Each,
    Either,
    FileName,
    FilePath,
    Kind,
    Nested,
    Number,
    Section,
    Several,
    Text,
    Truth,
    Typed,
    Whole,
    of_signature,
    show,
)
from ppsr.tiling import DEFAULT_OVERLAP

__all__ = [
    'DATASETS',
    'LOSSES',
    'METRICS',
    'OPTIMIZERS',
    'PERCEPTUAL_LOSSES',
    'SCHEDULERS',
    'Logger',
    'OpenLogger',
    'OpenOptions',
    'OpenPaths',
    'OpenTrain',
    'Options',
    'Paths',
    'Train',
    'TrainVal',
    'Val',
    'dataset_kind',
    'registered',
]

ITERATIONS = 10**9
LARGE = 1_000_000
MAX_SEED = 2**31 - 1  # each process adds its rank, and numpy takes 32 bits
Step = Whole(1, ITERATIONS)
Weight = Number(0, LARGE)


def is_basicsr(thing: Any) -> bool:
    return thing.__module__.startswith('basicsr.')


# ------------------------------------------------------------------------------------------------------------ the whole


class Mapped(Kind):
    """A section that is checked when it is known which one it is."""

    words = 'a mapping of options'

    def read(self, value, where):
        if not isinstance(value, dict):
            raise ValueError
        return dict(value)


class OpenOptions(Section, extra='allow'):
    name: Annotated[str, FileName(), 'of the run: its folder in experiments/ or results/']
    model_type: Annotated[str, Text(), 'a registered model; ours is PurePassSRModel']
    scale: Annotated[int, Whole(1, 16), 'enlargement, that of the data and of network_g']
    num_gpu: Annotated[int | str, Either(Whole(0, 1024), Choice('auto')), '0: CPU; auto: all that torch sees'] = 'auto'
    manual_seed: Annotated[int | None, Whole(0, MAX_SEED), 'of everything random; ~: drawn and logged'] = None
    find_unused_parameters: Annotated[bool, Truth(), "DistributedDataParallel's, for networks that need it"] = False
    datasets: Annotated[dict, Mapped(), 'train, val, val_2, … of a training; test, test_1, … of a test']
    network_g: Annotated[dict | None, Mapped(), 'the network: type and constructor arguments'] = None
    path: Annotated[dict, Mapped(), 'weights and states to start from'] = {}
    train: Annotated[dict | None, Mapped(), 'losses, optimizer and schedule; a training has to have it'] = None
    val: Annotated[dict | None, Mapped(), 'validation or test; ~: a training without validation'] = None
    logger: Annotated[dict | None, Mapped(), 'how often to log and save; a training has to have it'] = None


class Options(OpenOptions, extra='forbid'):
    """Top level"""

    network_g: Annotated[dict, Mapped(), 'the network: type and constructor arguments']


class OpenPaths(Section, extra='allow'):
    resume_state: Annotated[str | None, FilePath(), 'training state to go on from; see also --auto_resume'] = None
    ignore_resume_networks: Annotated[list | None, Several(Text(), least=0), 'networks that a state leaves alone'] = (
        None
    )


class Paths(OpenPaths, extra='forbid'):
    """path"""

    pretrain_network_g: Annotated[str | None, FilePath(), 'weights to begin with: a file, or a shipped name'] = None
    param_key_g: Annotated[str | None, Text(), 'which parameters of a file with several'] = 'params_ema'
    strict_load_g: Annotated[bool, Truth(), 'refuse weights that lack or add a parameter'] = True


# ------------------------------------------------------------------------------------------------------------ data sets


class Template(Kind):
    words = "the name of an LQ image with one '{}' for that of its GT image, such as '{}x4'"

    def read(self, value, where):
        plain = isinstance(value, str) and value.count('{}') == 1
        if not plain or set('{}/\\\0') & set(value.replace('{}', '')):
            raise ValueError
        return value


class IoBackend(Section):
    type: Annotated[str, Choice('disk', 'lmdb'), 'folders of images, or LMDBs']


class DataSet(Section):
    name: Annotated[str, FileName(), 'in logs and folders; by default the key (train, val, …)'] = ''
    io_backend: Annotated[dict, Nested(IoBackend), 'how the images are stored: type disk or lmdb'] = {'type': 'disk'}


class LoaderKeys(Section):
    batch_size_per_gpu: Annotated[int, Whole(1, 65536), 'patches in a batch, of each process']
    num_worker_per_gpu: Annotated[int, Whole(0, 1024), 'loader processes; 0: none but the training itself']
    dataset_enlarge_ratio: Annotated[float, Number(above=0, most=LARGE), 'an epoch has so many times the images'] = 1
    prefetch_mode: Annotated[str | None, Choice('cuda'), 'copy a batch ahead to the GPU; wants pin_memory'] = None
    pin_memory: Annotated[bool, Truth(), 'page-locked memory: faster copies to the GPU'] = False
    persistent_workers: Annotated[bool, Truth(), 'keep the loader processes between epochs'] = False


class TrainKeys(LoaderKeys):
    gt_size: Annotated[int, Whole(1, 65536), 'side of a GT patch, a multiple of the scale']
    use_hflip: Annotated[bool, Truth(), 'random horizontal flips'] = True
    use_rot: Annotated[bool, Truth(), 'random vertical flips and transposes'] = True
    synthetic_graphics: Annotated[float, Number(0, 1), 'share of the batches that is made of drawings instead'] = 0.0


class PairKeys(DataSet):
    dataroot_gt: Annotated[str, FilePath(), 'HR images: a folder or an LMDB']
    dataroot_lq: Annotated[str, FilePath(), 'LR images']
    meta_info_file: Annotated[str | None, FilePath(), 'names of the GT images to use; ~: all'] = None
    filename_tmpl: Annotated[str, Template(), "name of an LQ image for a GT image's, without suffix"] = '{}'


class PairedSR(PairKeys):
    check_pairs: Annotated[
        int | str, Either(Whole(1, ITERATIONS), Choice('all')), 'how many pairs have their sizes checked at the start'
    ] = 1000


class PairedSRTrain(TrainKeys, PairedSR):
    """PairedSRDataset for training"""


class PixelKeys(Section):
    color: Annotated[str | None, Choice('y'), 'y: luma only'] = None
    mean: Annotated[list | None, Several(Number(-LARGE, LARGE), 3), 'subtracted from RGB'] = None
    std: Annotated[list | None, Several(Number(above=0, most=LARGE), 3), 'RGB is divided by'] = None


class PairedImage(PixelKeys, PairKeys):
    """PairedImageDataset"""


class PairedImageTrain(TrainKeys, PairedImage):
    """PairedImageDataset for training"""


class SingleImage(PixelKeys, DataSet):
    """SingleImageDataset"""

    dataroot_lq: Annotated[str, FilePath(), 'LR images']
    meta_info_file: Annotated[str | None, FilePath(), 'names of the images to use; ~: all'] = None


class SyntheticGraphics(DataSet):
    """SyntheticGraphics: drawings from a seed"""

    gt_size: Annotated[int, Whole(1, 65536), 'side of an HR picture, a multiple of the scale']
    length: Annotated[int, Whole(1, ITERATIONS), 'so many pictures'] = 10000
    seed: Annotated[int, Whole(0, MAX_SEED), 'of the whole set'] = 0


class SyntheticGraphicsTrain(LoaderKeys, SyntheticGraphics):
    """SyntheticGraphics for training"""


class OpenDataSet(DataSet, extra='allow'):
    io_backend: Annotated[dict, Mapped(), 'how the images are stored'] = {'type': 'disk'}


class OpenTrainSet(LoaderKeys, OpenDataSet, extra='allow'):
    pass


# by type: for training, and for validation and tests
DATASETS = {
    True: {
        'PairedSRDataset': PairedSRTrain,
        'PairedImageDataset': PairedImageTrain,
        'SyntheticGraphics': SyntheticGraphicsTrain,
    },
    False: {
        'PairedSRDataset': PairedSR,
        'PairedImageDataset': PairedImage,
        'SingleImageDataset': SingleImage,
        'SyntheticGraphics': SyntheticGraphics,
    },
}


def dataset_kind(train: bool, ours: bool) -> Typed:
    """The section of a data set.

    Args:
        train: for training, else for validation and tests.
        ours: for our model, which trains on pairs; basicsr's other data sets are for its other models.
    """

    def others(name: str) -> type[Section] | None:
        found = registered(DATASET_REGISTRY, name)
        if found is None or (ours and is_basicsr(found)):
            return None
        return OpenTrainSet if train else OpenDataSet

    return Typed(DATASETS[train], others)


# ------------------------------------------------------------------------------------------------------------- training


class Optimizer(Section):
    lr: Annotated[float, Number(0, 100), 'learning rate']
    weight_decay: Annotated[float, Number(0, 100), 'decay of the weights'] = 0.0


class AdamLike(Optimizer):
    betas: Annotated[list, Several(Number(0, below=1), 2), 'decay of the running means'] = [0.9, 0.999]
    eps: Annotated[float, Number(above=0, most=1), 'added to the denominator'] = 1e-8
    foreach: Annotated[bool | None, Truth(), "torch's grouped implementation"] = None


class Adam(AdamLike):
    amsgrad: Annotated[bool, Truth(), 'the AMSGrad variant'] = False
    fused: Annotated[bool | None, Truth(), "torch's fused implementation"] = None

    @classmethod
    def together(cls, values, where):
        if values['fused'] and values['foreach']:
            raise UserError(f'{where}: fused and foreach exclude each other.')


class AdamW(Adam):
    weight_decay: Annotated[float, Number(0, 100), 'decay of the weights'] = 0.01


class RAdam(AdamLike):
    decoupled_weight_decay: Annotated[bool, Truth(), 'as in AdamW'] = False


class NAdam(RAdam):
    momentum_decay: Annotated[float, Number(0, 1), 'decay of the momentum'] = 0.004


class SGD(Optimizer):
    momentum: Annotated[float, Number(0, below=1), 'share of the last step'] = 0.0
    dampening: Annotated[float, Number(0, 1), 'of the momentum'] = 0.0
    nesterov: Annotated[bool, Truth(), "Nesterov's momentum"] = False

    @classmethod
    def together(cls, values, where):
        if values['nesterov'] and (not values['momentum'] or values['dampening']):
            raise UserError(f'{where}: nesterov needs a momentum above 0 and a dampening of 0.')


class RMSprop(Optimizer):
    alpha: Annotated[float, Number(0, below=1), 'smoothing'] = 0.99
    eps: Annotated[float, Number(above=0, most=1), 'added to the denominator'] = 1e-8
    momentum: Annotated[float, Number(0, below=1), 'share of the last step'] = 0.0
    centered: Annotated[bool, Truth(), 'normalise by the variance'] = False


class MuonOthers(Section):
    lr: Annotated[float | None, Number(0, 100), "learning rate; ~: Muon's"] = None
    betas: Annotated[list, Several(Number(0, below=1), 2), 'decay of the running means'] = [0.9, 0.95]
    eps: Annotated[float, Number(above=0, most=1), 'added to the denominator'] = 1e-8
    weight_decay: Annotated[float, Number(0, 100), 'decay of the weights'] = 0.0


class Muon(Optimizer):
    momentum: Annotated[float, Number(0, below=1), 'share of the last step'] = 0.95
    nesterov: Annotated[bool, Truth(), "Nesterov's momentum"] = True
    ns_steps: Annotated[int, Whole(1, 99), 'of the Newton-Schulz iteration'] = 5
    adjust_lr_fn: Annotated[str, Choice('match_rms_adamw', 'original'), "steps of AdamW's size, or Muon's own"] = (
        'match_rms_adamw'
    )
    adamw: Annotated[dict, Nested(MuonOthers), 'AdamW, for all but matrices and kernels: lr, betas, …'] = {}


OPTIMIZERS = {
    'Adam': Adam,
    'AdamW': AdamW,
    'SGD': SGD,
    'RMSprop': RMSprop,
    'RAdam': RAdam,
    'NAdam': NAdam,
    'Muon': Muon,
}


class MultiStep(Section):
    """Times gamma at each milestone"""

    milestones: Annotated[list, Several(Step, least=0), 'iterations']
    gamma: Annotated[float, Number(above=0, most=1), 'factor of the learning rate'] = 0.1
    restarts: Annotated[list, Several(Whole(0, ITERATIONS)), 'iterations at which it begins anew'] = [0]
    restart_weights: Annotated[list, Several(Weight), 'factor of the first learning rate at each'] = [1]

    @classmethod
    def together(cls, values, where):
        _as_many(values, 'restart_weights', 'restarts', where)


class Cosine(Section):
    """Cosine annealing with restarts"""

    periods: Annotated[list, Several(Step), 'iterations of each cycle; total_iter at least, in all']
    restart_weights: Annotated[list, Several(Weight), 'factor of the first learning rate in each'] = [1]
    eta_min: Annotated[float, Number(0, 100), 'lowest learning rate'] = 0.0

    @classmethod
    def together(cls, values, where):
        _as_many(values, 'restart_weights', 'periods', where)


def _as_many(values: dict, key: str, as_key: str, where: str) -> None:
    if len(values[key]) != len(values[as_key]):
        raise UserError(f'{where} → {key} must have {len(values[as_key])} numbers, one for each of {as_key}.')


SCHEDULERS = {'MultiStepLR': MultiStep, 'MultiStepRestartLR': MultiStep, 'CosineAnnealingRestartLR': Cosine}


class PixelLoss(Section):
    loss_weight: Annotated[float, Weight, 'factor'] = 1.0
    reduction: Annotated[str, Choice('mean', 'sum'), 'over the pixels'] = 'mean'


class CharbonnierLoss(PixelLoss):
    eps: Annotated[float, Number(above=0, most=1), 'of the square root'] = 1e-12


LOSSES = {'L1Loss': PixelLoss, 'MSELoss': PixelLoss, 'CharbonnierLoss': CharbonnierLoss}


class PerceptualLoss(Section):
    layer_weights: Annotated[dict, Each(Weight, least=1), 'layer of the VGG network: weight']
    vgg_type: Annotated[str, Choice(*VGG, *(f'{name}_bn' for name in VGG)), 'which VGG network'] = 'vgg19'
    use_input_norm: Annotated[bool, Truth(), 'normalise as for ImageNet'] = True
    range_norm: Annotated[bool, Truth(), 'images are in [-1, 1]'] = False
    perceptual_weight: Annotated[float, Weight, 'factor of the perceptual loss'] = 1.0
    style_weight: Annotated[float, Weight, 'factor of the style loss'] = 0.0
    criterion: Annotated[str, Choice('l1', 'fro'), 'distance of features'] = 'l1'

    @classmethod
    def together(cls, values, where):
        layers = VGG[values['vgg_type'].removesuffix('_bn')]
        for layer in values['layer_weights']:
            if layer not in layers:
                raise UserError(
                    f'{where} → layer_weights: {show(layer)} is no layer of {values["vgg_type"]}; its layers are '
                    f'{", ".join(layers)}.'
                )


PERCEPTUAL_LOSSES = {'PerceptualLoss': PerceptualLoss}


def _other_loss(name: str) -> type[Section] | None:
    """A loss that another package has registered; those of basicsr that are not declared take other arguments than a
    result and a ground truth."""
    found = registered(LOSS_REGISTRY, name)
    return None if found is None or is_basicsr(found) else of_signature(found)


class FlatPictures(Section):
    """One-colour pictures beside every batch, whose colour has to stay as it is"""

    loss_weight: Annotated[float, Weight, 'factor'] = 1.0
    square_weight: Annotated[float, Weight, 'of the squared error, beside the absolute one'] = 40.0
    sides: Annotated[list, Several(Whole(1, 4096), 2), 'least and largest side in LR pixels, drawn anew each step'] = [
        12,
        48,
    ]
    pixels: Annotated[int, Step, 'LR pixels of a step in all, of each process; one picture at least'] = 1536

    @classmethod
    def together(cls, values, where):
        if values['sides'][0] > values['sides'][1]:
            raise UserError(f'{where} → sides must name the least side first, not {show(values["sides"])}.')


class Teacher(Section):
    """A finished network whose answers are learned, too"""

    weights: Annotated[str, FilePath(), 'weight file of ours or that spandrel knows, or a shipped name; same scale']
    loss_weight: Annotated[float, Weight, 'factor of the mean absolute distance to its answers (l_teacher)'] = 0.5
    cache: Annotated[str | None, FilePath(), 'folder for its answers to whole training images; ~: asked each step'] = (
        None
    )
    tile: Annotated[int, Whole(0, LARGE), 'LR side from which it works in tiles; 0: never'] = 256
    features: Annotated[bool, Truth(), "each group learns what the teacher's does, too (l_features)"] = False
    features_weight: Annotated[float, Weight, 'factor of the normalised squared error of the groups'] = 1.0

    @classmethod
    def together(cls, values, where):
        if not values['loss_weight'] and not (values['features'] and values['features_weight']):
            raise UserError(f'{where} teaches nothing: loss_weight is 0 and features are not learned.')
        if 0 < values['tile'] <= DEFAULT_OVERLAP:
            raise UserError(f'{where} → tile {values["tile"]} must be larger than the overlap of {DEFAULT_OVERLAP}.')


class OpenTrain(Section, extra='allow'):
    total_iter: Annotated[int, Step, 'iterations in all']
    warmup_iter: Annotated[int, Whole(-1, ITERATIONS), 'the learning rate rises linearly for so long; -1: no'] = -1


class Train(OpenTrain, extra='forbid'):
    """train"""

    optim_g: Annotated[dict, Typed(OPTIMIZERS), 'optimizer: type and settings']
    scheduler: Annotated[dict, Typed(SCHEDULERS), 'learning rate over time: type and settings']
    pixel_opt: Annotated[dict | None, Typed(LOSSES, _other_loss), 'loss on pixels: type and settings'] = None
    perceptual_opt: Annotated[dict | None, Typed(PERCEPTUAL_LOSSES, _other_loss), 'loss on features'] = None
    auxiliary_weights: Annotated[dict | None, Each(Weight), "factors of the network's own losses, by name"] = None
    teacher: Annotated[dict | None, Nested(Teacher), 'distillation: weights, loss_weight, cache, features'] = None
    flat_opt: Annotated[dict | None, Nested(FlatPictures), 'one-colour pictures in every step; {}: as by default'] = (
        None
    )
    pp_probability: Annotated[float, Number(0, 1), 'share of the batches with a mask; the others run dense'] = 1.0
    pp_paper_probability: Annotated[
        float, Number(0, 1), "share of all batches in the paper's setting: colour mask, category attention alone"
    ] = 0.0
    pp_threshold_range: Annotated[
        list | None, Several(Number(above=0, most=2), 2), "the mask's threshold is drawn from it for each batch"
    ] = None
    ema_decay: Annotated[float, Number(0, below=1), 'of the running mean of the weights; 0: none'] = 0.0
    grad_clip_norm: Annotated[float | None, Number(above=0, most=10**9), 'scale the gradient down to this norm'] = None
    amp: Annotated[str | None, Choice('bf16', 'fp16'), 'autocast of the network; losses and weights stay float32'] = (
        None
    )
    max_nonfinite: Annotated[int, Whole(1, ITERATIONS), 'so many steps with NaN or Inf end the training'] = 10

    @classmethod
    def together(cls, values, where):
        if not values['pixel_opt'] and not values['perceptual_opt']:
            raise UserError(f'{where} lacks a loss: pixel_opt, perceptual_opt or both.')
        if values['pp_paper_probability'] > values['pp_probability']:
            raise UserError(
                f'{where} → pp_paper_probability {values["pp_paper_probability"]} must not be above pp_probability '
                f'{values["pp_probability"]}, of which it is a part.'
            )
        bounds = values['pp_threshold_range']
        if bounds and bounds[0] > bounds[1]:
            raise UserError(f'{where} → pp_threshold_range must name the lower end first, not {show(bounds)}.')
        periods = values['scheduler'].get('periods')
        if periods and sum(periods) < values['total_iter']:
            raise UserError(
                f'{where} → scheduler → periods end after {sum(periods)} iterations, before total_iter '
                f'{values["total_iter"]}; make them longer or add one.'
            )


# ----------------------------------------------------------------------------------------------------------- validation


class PSNR(Section):
    crop_border: Annotated[int, Whole(0, 65536), 'pixels left out at each edge']
    input_order: Annotated[str, Choice('HWC'), 'of the axes'] = 'HWC'
    test_y_channel: Annotated[bool, Truth(), 'on Y of YCbCr, as the benchmarks are'] = False
    better: Annotated[str, Choice('higher', 'lower'), 'of two values, for the record of the best'] = 'higher'


class NIQE(Section):
    crop_border: Annotated[int, Whole(0, 65536), 'pixels left out at each edge']
    input_order: Annotated[str, Choice('HWC'), 'of the axes'] = 'HWC'
    convert_to: Annotated[str, Choice('y', 'gray'), 'what it is measured on'] = 'y'
    better: Annotated[str, Choice('lower', 'higher'), 'of two values, for the record of the best'] = 'lower'


METRICS = {'calculate_psnr': PSNR, 'calculate_ssim': PSNR, 'calculate_niqe': NIQE}
WITHOUT_GT = ('calculate_niqe',)


def _other_metric(name: str) -> type[Section] | None:
    found = registered(METRIC_REGISTRY, name)
    if found is None or is_basicsr(found):
        return None
    better = (Annotated[str, Choice('higher', 'lower')], 'higher')
    return of_signature(found, given=('img', 'img2'), better=better)


class Val(Section):
    """val"""

    save_img: Annotated[bool, Truth(), 'save the enlarged images'] = False
    suffix: Annotated[str | None, FileName(), 'of saved images; ~: the name of the run'] = None
    pbar: Annotated[bool, Truth(), 'a progress bar'] = False
    tile: Annotated[int | None, Whole(0, LARGE), 'side of a tile in LR pixels; ~ or 0: whole images'] = None
    tile_overlap: Annotated[int | None, Whole(0, LARGE), 'LR pixels that tiles share'] = DEFAULT_OVERLAP
    metrics: Annotated[dict | None, Each(Typed(METRICS, _other_metric)), 'a name of your choice: type and settings'] = (
        None
    )

    @classmethod
    def together(cls, values, where):
        if values['tile_overlap'] is None:
            values['tile_overlap'] = DEFAULT_OVERLAP
        if values['tile'] and values['tile_overlap'] >= values['tile']:
            raise UserError(
                f'{where} → tile_overlap {values["tile_overlap"]} must be smaller than tile {values["tile"]}.'
            )


class TrainVal(Val):
    """val of a training"""

    val_freq: Annotated[int, Step, 'validate every so many iterations']


class OpenVal(Val, extra='allow'):
    pass


class OpenTrainVal(TrainVal, extra='allow'):
    pass


# -------------------------------------------------------------------------------------------------------------- logging


class Wandb(Section):
    project: Annotated[str | None, Text(), 'of Weights & Biases; ~: not used'] = None
    resume_id: Annotated[str | None, Text(), 'of the run there that goes on'] = None


class OpenLogger(Section, extra='allow'):
    print_freq: Annotated[int, Step, 'a log line every so many iterations']
    save_checkpoint_freq: Annotated[int, Step, 'a checkpoint every so many iterations']
    use_tb_logger: Annotated[bool, Truth(), 'write curves for TensorBoard to tb_logger/'] = False
    wandb: Annotated[dict | None, Nested(Wandb), 'Weights & Biases: project, resume_id'] = None

    @classmethod
    def together(cls, values, where):
        if (values['wandb'] or {}).get('project') and not values['use_tb_logger']:
            raise UserError(f'{where} → wandb gets its curves from TensorBoard: set use_tb_logger: true, too.')


class Logger(OpenLogger, extra='forbid'):
    """logger"""

    keep_last: Annotated[int | None, Whole(1, ITERATIONS), 'keep so many checkpoints, and the best; ~: all'] = None
