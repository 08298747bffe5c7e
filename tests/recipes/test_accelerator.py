"""recipes/_accelerator.py and what a recipe leaves to the device: precision, memory format, cores."""
import _accelerator
import _start
import pytest
import timm
import tiny
import torch
from test_train import make_recipe
from timm.layers import convert_sync_batchnorm


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


class Several:
    """As much of an Accelerator as is asked before training, of several processes."""
    num_processes, device, is_main_process = 2, torch.device('cpu'), True

    def __init__(self, *args, **kwargs):
        pass


@pytest.mark.parametrize('option', [dict(sync_bn=True), dict(comm_hook='bf16')])
def test_what_needs_gpus_is_refused_without_and_said_to_do_nothing_with_one_process(
        option, digits_folder, tmp_path, monkeypatch, capsys, fresh_accelerator):
    recipe = make_recipe(digits_folder, **option)
    _accelerator.make_accelerator(recipe, tmp_path)
    name = '--' + next(iter(option)).replace('_', '-')
    assert f'{name} has no effect: there is one process' in capsys.readouterr().out.replace(' bf16', '')
    monkeypatch.setattr(_accelerator, 'Accelerator', Several)
    with pytest.raises(SystemExit, match=f'{name}.* needs CUDA devices, these processes have cpu'):
        _accelerator.make_accelerator(recipe, tmp_path)


@pytest.mark.parametrize('name, hook', [(None, 'no'), ('fp16', 'fp16'), ('bf16', 'bf16')])
def test_gradients_are_compressed_by_accelerates_hook(name, hook, digits_folder, tmp_path, fresh_accelerator):
    accelerator = _accelerator.make_accelerator(make_recipe(digits_folder, comm_hook=name), tmp_path)
    assert accelerator.ddp_handler.comm_hook.value == hook


def test_every_batch_norm_of_a_network_can_be_synchronised():
    """The attention's too; state and evaluation stay as they are."""
    torch.manual_seed(0)
    network = timm.create_model(tiny.NAME).eval()
    images, state = torch.randn(2, 3, 8, 8), {k: v.clone() for k, v in network.state_dict().items()}
    expected = network(images)
    synchronised = convert_sync_batchnorm(network)
    norms = [m for m in synchronised.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {torch.nn.SyncBatchNorm} and len(norms) > 8
    assert synchronised.state_dict().keys() == state.keys()
    torch.testing.assert_close(synchronised(images), expected)
