"""recipes/_accelerator.py and what a recipe leaves to the device: precision, memory format, cores."""
import _accelerator
import _start
import pytest
import timm
import tiny
import torch
from test_train import make_recipe


@pytest.mark.parametrize('in_hardware, on_cpu, expected', [
    (True, '0', 'bf16'), (False, '0', 'fp32'), (True, '1', 'fp32'),
])
def test_bfloat16_is_chosen_only_where_the_gpu_in_use_computes_in_it(in_hardware, on_cpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(
        torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation or in_hardware)
    monkeypatch.setenv('ACCELERATE_USE_CPU', on_cpu)
    assert _accelerator.auto_precision() == expected


def test_no_more_workers_load_images_than_there_are_cores(digits_folder, monkeypatch):
    monkeypatch.setattr(_start, 'usable_cores', lambda: 2)
    network = timm.create_model(tiny.NAME, device='meta')
    for asked, used in (0, 0), (1, 1), (8, 2):
        recipe = make_recipe(digits_folder, num_workers=asked)
        assert _start.complete(recipe, network).num_workers == used


def test_cores_are_counted_where_a_process_cannot_be_bound_to_some(monkeypatch):
    monkeypatch.delattr(_accelerator.os, 'sched_getaffinity', raising=False)
    assert _accelerator.usable_cores() == (_accelerator.os.cpu_count() or 1)


def test_processes_wait_for_hours_and_send_buffers_only_when_asked(digits_folder, tmp_path, fresh_accelerator):
    accelerator = _accelerator.make_accelerator(make_recipe(digits_folder), tmp_path)
    assert accelerator.init_handler.timeout.total_seconds() >= 6 * 3600
    assert accelerator.ddp_handler.broadcast_buffers is False
