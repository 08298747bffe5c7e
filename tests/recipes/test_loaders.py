"""recipes/_loaders.py: an epoch can begin at any of its batches, and loading draws from no generator of training."""
import _loaders
import numpy as np
import pytest
import torch
from _data import open_images
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from test_train import make_recipe
from timm.data import resolve_data_config


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('num_workers', [0, 2])
def test_an_epoch_goes_on_at_any_batch_with_the_same_images(processes, num_workers, digits_folder, fresh_accelerator):
    Accelerator(cpu=True)
    recipe = make_recipe(digits_folder, aa='rand-m5', num_workers=num_workers)
    images = open_images(recipe)
    data_config = dict(resolve_data_config(dict(img_size=8)), input_size=(3, 8, 8))
    loader = _loaders.make_loaders(recipe, images, data_config, pin_memory=False)[0]
    for process in range(processes):
        prepared = prepare_data_loader(
            loader, num_processes=processes, process_index=process, split_batches=True, use_seedable_sampler=True,
            data_seed=recipe.seed, put_on_device=False, rng_types=['generator'])
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        epochs = [list(_loaders.batches_of(prepared, epoch)) for epoch in range(3)]
        rest = list(_loaders.batches_of(prepared, 1, first=2))
        assert [len(epoch) for epoch in epochs] == [4, 4, 4] and len(rest) == 2
        for (pixels, labels), (expected, expected_labels) in zip(rest, epochs[1][2:]):
            assert torch.equal(labels, expected_labels) and torch.equal(pixels, expected)
        assert not torch.equal(epochs[1][2][0], epochs[2][2][0])
        assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()


def test_a_loader_of_another_kind_skips_batches_itself():
    class Loader:
        def set_epoch(self, epoch):
            self.epoch = epoch

        def skip_first_batches(self, first):
            return range(first, 4)

    loader = Loader()
    assert _loaders.batches_of(loader, 3) is loader and loader.epoch == 3
    assert list(_loaders.batches_of(loader, 3, first=2)) == [2, 3]
