"""Writes the options files of training and test in this folder, all from one template:

    python options/make.py

A new network is an entry in NETWORKS; what all files have in common is changed in TRAIN or TEST. tests/training says so
when a file is not what this gives. demo.yml, study.yml and the recipes for CPUs (*_cpu.yml, *_window.yml) are
written by hand.
"""

from pathlib import Path
from string import Template
from typing import NamedTuple

from ppsr.archs import (
    ATDLight,
    ATDLightV2,
    CAMixerATDLight,
    PPATDLight,
    PPATDLightV2,
    PPSwinIRLight,
    SwinIRLight,
)

SCALES = (2, 3, 4)
BENCHMARKS = ('Set5', 'Set14', 'BSD100', 'Urban100', 'Manga109')

PURE_PASS = """\
  # Pure-Pass: which pixels are exempt from attention, from which, and what they get instead
  pp_mask: colour  # colour (the paper's) | gradient | variance | dynamic | both
  pp_threshold: ~  # of gradient (~ = 0.05), variance and both (~ = 0.07): below it a pixel is flat
  pp_num_centers: 8  # colour centres
  pp_window_size: 5
  pp_shift: ~  # offset of the second grid; ~ = half the window
  pp_fuse: true  # union of the masks on both grids
  pp_scope: [category]  # or [category, window]
  pp_compensation: value  # instead of category attention: value | bypass | zero
  pp_window_compensation: linear  # instead of window attention: linear (learned) | value | mean
"""
PURE_PASS_WINDOW = ''.join(
    line.replace('[category]  # or [category, window]', '[window]').replace(
        'linear  # instead of window attention: linear (learned) | value | mean',
        'value  # instead of window attention: value | mean | linear (learned)',
    )
    for line in PURE_PASS.splitlines(True)
    if 'pp_compensation' not in line
)
CAMIXER = """\
  camixer_ratio: 0.5  # share of the windows that get attention
"""
CAMIXER_LOSS = """\
  auxiliary_weights:
    ratio: 0.1  # of (share of attended windows - camixer_ratio)^2, mean over the layers
"""


class Backbone(NamedTuple):
    """A published network: its settings and its schedules, those of x2 from scratch and of x3, x4 from x2."""

    title: str
    structure: str  # sizes
    mlp_ratio: int
    batch: int
    amp: str
    optimizer: str
    betas: str
    lr: str
    lr_from_x2: str
    milestones: str
    milestones_from_x2: str
    warmup_iter: int  # of x2; half of it for the others; -1: none


FIRST = Backbone(
    title='ATD-light',
    structure="""\
  embed_dim: 48
  depths: [6, 6, 6, 6]
  num_heads: [4, 4, 4, 4]
  window_size: 16
  category_size: 128
  num_tokens: 64
  reducted_dim: 8
  convffn_kernel_size: 7
""",
    mlp_ratio=1,
    batch=32,
    amp='~  # bf16 | fp16: autocast of the network, losses and weights stay float32',
    optimizer='AdamW',
    betas='[0.9, 0.9]',
    lr='5.0e-4',
    lr_from_x2='2.0e-4',
    milestones='[250000, 400000, 450000, 475000, 490000]',
    milestones_from_x2='[150000, 200000, 225000, 240000]',
    warmup_iter=20000,
)
SECOND = FIRST._replace(
    title='ATD-light v2',
    structure="""\
  embed_dim: 48
  depths: [6, 6, 6, 6]
  num_heads: [3, 3, 3, 3]
  window_size: 16
  category_size: 128
  num_tokens: 128
  reducted_dim: 12
  dim_ffn_td: 4  # channels that tell the feed-forward network of the category of a token
  convffn_kernel_size: 7
""",
    batch=64,
    amp='fp16  # autocast of the network, losses and weights stay float32; on a CPU: bf16 or ~',
    milestones='[250000, 400000, 450000, 480000]',
    milestones_from_x2='[125000, 200000, 225000, 240000]',
)
SWINIR = Backbone(
    title='SwinIR-light',
    structure="""\
  embed_dim: 60
  depths: [6, 6, 6, 6]
  num_heads: [6, 6, 6, 6]
  window_size: 8
  drop_path_rate: 0.1  # stochastic depth in training
""",
    mlp_ratio=2,
    batch=64,
    amp=FIRST.amp,
    optimizer='Adam',
    betas='[0.9, 0.999]',
    lr='2.0e-4',
    lr_from_x2='1.0e-4',
    milestones='[250000, 400000, 450000, 475000]',
    milestones_from_x2='[125000, 200000, 225000, 237500]',
    warmup_iter=-1,
)
# file name -> arch, backbone, its own settings, its own lines under train
NETWORKS = {
    'pp_atd_light': (PPATDLight, FIRST, PURE_PASS, ''),
    'atd_light': (ATDLight, FIRST, '', ''),
    'camixer_atd_light': (CAMixerATDLight, FIRST, CAMIXER, CAMIXER_LOSS),
    'pp_atd_light_v2': (PPATDLightV2, SECOND, PURE_PASS, ''),
    'atd_light_v2': (ATDLightV2, SECOND, '', ''),
    'pp_swinir_light': (PPSwinIRLight, SWINIR, PURE_PASS_WINDOW, ''),
    'swinir_light': (SwinIRLight, SWINIR, '', ''),
}

# the published schedules: x2 from scratch, x3 and x4 from the x2 weights
FROM_SCRATCH = {
    'start': 'from scratch',
    'weights': '~',
    'strict': 'true',
    'total_iter': '500000',
}
FROM_X2 = {
    'start': 'from the x2 weights (options/${name}_x2.yml)',
    'weights': 'experiments/${name}_x2/models/net_g_latest.pth',
    'strict': 'false  # the upsampler of x2 has another shape and starts anew',
    'total_iter': '250000',
}

NETWORK = """\
# network structure (defaults: ${title} as published)
network_g:
  type: ${arch}
  upscale: ${scale}
  in_chans: 3
  img_size: 64
${structure}  img_range: 1.
  mlp_ratio: ${mlp_ratio}
  upsampler: pixelshuffledirect
  resi_connection: 1conv
  use_checkpoint: false  # true: less memory in training, more time
${own}"""

TRAIN = (
    """\
# ${arch} x${scale}, trained on DIV2K ${start}, the schedule published for ${title}.
# Data: ppsr prepare, see datasets/README.md. Run: ppsr train -opt options/${name}_x${scale}.yml

name: ${name}_x${scale}
model_type: PurePassSRModel
scale: ${scale}
num_gpu: auto  # 0: CPU
manual_seed: 10

datasets:
  train:
    name: DIV2K
    type: PairedSRDataset
    dataroot_gt: datasets/DIV2K/HR_x${scale}_sub
    dataroot_lq: datasets/DIV2K/LRbicx${scale}_sub
    meta_info_file: datasets/DIV2K/meta_info_x${scale}_sub.txt
    io_backend:
      type: disk
    # or, from the LMDBs: dataroot_gt: …_sub.lmdb, dataroot_lq: …_sub.lmdb, io_backend: type: lmdb, no meta_info_file

    gt_size: ${gt_size}  # 64x64 LR patches
    use_hflip: true
    use_rot: true
    synthetic_graphics: 0.12  # share of batches made of drawings, so that pure colours stay pure; published: 0

    num_worker_per_gpu: 8
    batch_size_per_gpu: ${batch}  # ${batch} in all: ${batch_on_4} on each of 4 GPUs, ${batch_on_8} on each of 8
    dataset_enlarge_ratio: 1
    prefetch_mode: ~
    pin_memory: true

  val:
    name: Set5
    type: PairedSRDataset
    dataroot_gt: datasets/Set5/HR
    dataroot_lq: datasets/Set5/LRbicx${scale}
    io_backend:
      type: disk

  val_2:
    name: Set14
    type: PairedSRDataset
    dataroot_gt: datasets/Set14/HR
    dataroot_lq: datasets/Set14/LRbicx${scale}
    io_backend:
      type: disk

"""
    + NETWORK
    + """
path:
  pretrain_network_g: ${weights}
  strict_load_g: ${strict}
  resume_state: ~

train:
  ema_decay: 0.999
  optim_g:
    type: ${optimizer}
    lr: ${lr}
    weight_decay: 0
    betas: ${betas}

  scheduler:
    type: MultiStepLR
    milestones: ${milestones}
    gamma: 0.5

  total_iter: ${total_iter}
  warmup_iter: ${warmup_iter}
  grad_clip_norm: ~  # scale the gradient down to this norm, e.g. 1.0
  amp: ${amp}
  max_nonfinite: 10  # steps with NaN or Inf are skipped and noted in nonfinite.jsonl; so many end the training

  pixel_opt:
    type: L1Loss
    loss_weight: 1.0
    reduction: mean

  flat_opt: {}  # one-colour pictures in every step: their colour has to stay as it is; published: ~
${own_train}
val:
  val_freq: 5000
  save_img: false
  pbar: false
  tile: ~  # side of a tile in LR pixels; ~ = whole images, as the published figures
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: ${scale}
      test_y_channel: true
      better: higher
    ssim:
      type: calculate_ssim
      crop_border: ${scale}
      test_y_channel: true
      better: higher

logger:
  print_freq: 100
  save_checkpoint_freq: 5000
  keep_last: ~  # keep so many checkpoints and delete older ones; ~ = all
  use_tb_logger: true
  wandb:
    project: ~
    resume_id: ~
"""
)

TEST = (
    """\
# ${arch} x${scale} on the five benchmarks: PSNR and SSIM on Y, crop ${scale}, whole images.
# Run: ppsr test -opt options/test/${name}_x${scale}.yml
${shipped}
name: test_${name}_x${scale}
model_type: PurePassSRModel
scale: ${scale}
num_gpu: auto
manual_seed: 10

datasets:
${benchmarks}
"""
    + NETWORK
    + """
path:
  pretrain_network_g: experiments/${name}_x${scale}/models/net_g_latest.pth
  strict_load_g: true

val:
  save_img: true
  suffix: ~  # of the saved images; ~ = the name above
  pbar: true
  tile: ~
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: ${scale}
      test_y_channel: true
    ssim:
      type: calculate_ssim
      crop_border: ${scale}
      test_y_channel: true
"""
)
BENCHMARK = """\
  test_${number}:
    name: ${dataset}
    type: PairedSRDataset
    dataroot_gt: datasets/${dataset}/HR
    dataroot_lq: datasets/${dataset}/LRbicx${scale}
    io_backend:
      type: disk
"""
SHIPPED = {('pp_atd_light', 4): '# The weights that are shipped: --force_yml path:pretrain_network_g=PPATDLight_x4\n'}


def fill(text: str, **values) -> str:
    """`text` with ${…} filled in, in the values, too."""
    return Template(Template(text).substitute(values)).substitute(values)


def files() -> dict[str, str]:
    """Every file by its path in this folder, and what it holds."""
    made = {}
    for name, (arch, backbone, own, own_train) in NETWORKS.items():
        for scale in SCALES:
            values = {'name': name, 'arch': arch.__name__, 'scale': scale, 'own': own, 'own_train': own_train}
            values |= backbone._asdict() | {f'batch_on_{n}': backbone.batch // n for n in (4, 8)}
            schedule = FROM_SCRATCH
            if scale > 2:
                schedule = FROM_X2 | {
                    'lr': backbone.lr_from_x2,
                    'milestones': backbone.milestones_from_x2,
                    'warmup_iter': backbone.warmup_iter // 2,
                }
            made[f'{name}_x{scale}.yml'] = fill(TRAIN, gt_size=64 * scale, **values | schedule)
            benchmarks = ''.join(
                fill(BENCHMARK, number=number, dataset=dataset, scale=scale)
                for number, dataset in enumerate(BENCHMARKS, 1)
            )
            shipped = SHIPPED.get((name, scale), '')
            made[f'test/{name}_x{scale}.yml'] = fill(TEST, benchmarks=benchmarks, shipped=shipped, **values)
    return made


if __name__ == '__main__':
    for path, text in files().items():
        (Path(__file__).parent / path).write_text(text, encoding='utf-8')
