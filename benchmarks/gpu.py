"""Times the CUDA backends on a GPU: category attention alone, replayed from a CUDA graph, and the whole network.

    python benchmarks/gpu.py [--width 320 --height 180] [--pure 0 0.4 1] [--repeats 50]

Every figure is the median in milliseconds of `repeats` runs between two CUDA events, the candidates taking turns so
that clocks and temperature treat them alike. The time that the device waits for the host counts. The inputs are reused
and may lie in the cache. Nothing is printed about accuracy: tests/ops/test_*_attention_triton.py
compare the results on a GPU.
"""

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable

import torch

from ppsr.archs import ATDLight, ATDLightV2, PPATDLight, PPATDLightV2
from ppsr.ops import use_backend

BACKENDS = ('triton', 'torch', 'reference')
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS, HEADS, CATEGORY_SIZE, CATEGORIES = 48, 4, 128, 64  # as published


def milliseconds(run: Callable) -> float:
    """Time of one run on the device."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def medians(candidates: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median time of each candidate, run in turns after three rounds that compile and warm up."""
    times = {name: [] for name in candidates}
    for i in range(3 + repeats):
        for name, run in candidates.items():
            time = milliseconds(run)
            if i >= 3:
                times[name].append(time)
    return {name: statistics.median(values) for name, values in times.items()}


def captured(run: Callable) -> Callable:
    """A function that replays `run` from a CUDA graph; capturing fails if anything in it waits for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def category_attention(tokens: int, share: float, dtype: torch.dtype, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of forward and backward of each backend on one image with `share` pure tokens in random places."""
    random = torch.Generator('cuda').manual_seed(0)
    qkv = torch.randn(1, tokens, 3 * CHANNELS, device='cuda', generator=random).to(dtype)
    grad_out = torch.randn(1, tokens, CHANNELS, device='cuda', generator=random).to(dtype)
    category = torch.randint(CATEGORIES, (1, tokens), device='cuda', generator=random)
    pure = torch.rand(1, tokens, device='cuda', generator=random) < share
    scale = torch.full((), 10.0, device='cuda')
    sizes = (HEADS, CATEGORY_SIZE, True)
    forward, backward = {}, {}
    for name in BACKENDS:
        backend = importlib.import_module(f'ppsr.ops.category_attention.{name}')
        saved = backend.forward(qkv, category, pure, scale, *sizes)
        forward[name] = lambda backend=backend: backend.forward(qkv, category, pure, scale, *sizes)
        backward[name] = lambda backend=backend, saved=saved: backend.backward(grad_out, qkv, *saved, scale, *sizes)
    forward['triton, graph'] = captured(forward['triton'])
    backward['triton, graph'] = captured(backward['triton'])
    return {'forward': medians(forward, repeats), 'backward': medians(backward, repeats)}


def image(height: int, width: int, share: float) -> torch.Tensor:
    """Noise with a grey band at its left, so that about `share` of the pixels are pure."""
    x = torch.rand(1, 3, height, width, device='cuda', generator=torch.Generator('cuda').manual_seed(0))
    x[..., : round(share * width)] = 0.5
    return x


@torch.no_grad()
def network(kind: type, x: torch.Tensor, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Medians of the forward pass of the published ×4 network with each backend, 16-bit types through autocast."""
    torch.manual_seed(0)
    model = kind().cuda().eval()

    def run(backend: str):
        with use_backend(backend), torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            model(x)

    return medians({name: lambda name=name: run(name) for name in BACKENDS}, repeats)


def row(label: str, times: dict[str, float]) -> str:
    """A line of the table: the times, and how many times as long as triton the others take."""
    cells = [f'{name} {time:8.3f} ({time / times["triton"]:.2f})' for name, time in times.items()]
    return f'{label:<52}' + '   '.join(cells)


def main() -> int:
    parser = argparse.ArgumentParser(description='Time the CUDA backends (medians in ms; in brackets: over triton).')
    parser.add_argument('--width', type=int, default=320, help='of the input, in pixels (default %(default)s)')
    parser.add_argument('--height', type=int, default=180, help='of the input, in pixels (default %(default)s)')
    parser.add_argument('--pure', type=float, nargs='+', default=[0.0, 0.4, 0.8, 1.0], help='shares of pure tokens')
    parser.add_argument('--repeats', type=int, default=50, help='runs per median (default %(default)s)')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print('benchmarks/gpu.py needs a CUDA device, and PyTorch sees none here.', file=sys.stderr)
        return 2

    import triton

    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}')
    print(f'{args.width}×{args.height} input, medians of {args.repeats} in ms; in brackets: over triton')
    for dtype in DTYPES:
        for share in args.pure:
            parts = category_attention(args.width * args.height, share, dtype, args.repeats)
            for part, times in parts.items():
                print(row(f'category attention {part}, {str(dtype)[6:]}, {share:.0%} pure', times), flush=True)
    for dtype in DTYPES:
        for share in args.pure:
            x = image(args.height, args.width, share)
            for kind in (ATDLight, PPATDLight, ATDLightV2, PPATDLightV2):
                times = network(kind, x, dtype, args.repeats)
                print(row(f'{kind.__name__}, {str(dtype)[6:]}, {share:.0%} flat', times), flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
