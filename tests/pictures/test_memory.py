"""How much memory there is, and how much a network takes."""

import time

import pytest
import torch

from ppsr.pictures import memory


@pytest.mark.parametrize('way', [memory._peak_rss, memory._sampled_peak_rss])
def test_bytes_per_pixel_are_measured(monkeypatch, way):
    def run(lq):  # 4000 bytes per pixel, held at once for a moment
        kept = torch.ones(1000 * lq.shape[-1] * lq.shape[-2])
        time.sleep(0.1)
        return kept

    monkeypatch.setattr(memory, '_peak_rss', way)
    assert 3600 < memory.measure_bytes_per_pixel(run, torch.device('cpu')) < 5000


@pytest.mark.parametrize('version', [1, 2])
def test_the_limit_of_every_control_group_above_counts(tmp_path, version):
    """SLURM and systemd put the limit deeper than the root, and the process deeper still."""
    limit, used, cached = {
        1: ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file'),
        2: ('memory.max', 'memory.current', 'inactive_file'),
    }[version]
    root = tmp_path / 'cgroup'
    base = root / 'memory' if version == 1 else root
    (tmp_path / 'self').write_text({1: '3:cpu:/x\n5:cpu,memory:/job/step/task\n', 2: '0::/job/step/task\n'}[version])
    (base / 'job/step/task').mkdir(parents=True)
    assert memory._cgroup_room(tmp_path / 'self', root) == float('inf')
    for folder, most, now, files in (('.', 'max', 0, 0), ('job', 1000, 700, 50), ('job/step', 5000, 0, 0)):
        (base / folder / limit).write_text(f'{most}\n')
        (base / folder / used).write_text(f'{now}\n')
        (base / folder / 'memory.stat').write_text(f'anon 1\n{cached} {files}\n')
    assert memory._cgroup_room(tmp_path / 'self', root) == 350
    (base / 'job/step/task' / limit).write_text('90')
    (base / 'job/step/task' / used).write_text('10')
    (base / 'job/step/task/memory.stat').write_text('')
    assert memory._cgroup_room(tmp_path / 'self', root) == 80
    assert memory._cgroup_room(tmp_path / 'nothing', root) == float('inf')
