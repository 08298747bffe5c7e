"""recipes/transfer.py: equal runs of all starts, a record of them, and what recipes/README.md says of it."""
import json
import statistics
from pathlib import Path

import _dataset
import _runs
import pytest
import tiny
import transfer

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_start_gets_the_same_seeds_and_steps_and_a_finished_run_is_kept(
        tmp_path, monkeypatch, fresh_accelerator, capsys):
    digits = _dataset.load_digits()
    digits['train'], digits['test'] = digits['train'].select(range(160)), digits['test'].select(range(40))
    monkeypatch.setattr(transfer, 'load_digits', lambda: digits)
    monkeypatch.setattr(transfer, 'STATIC', tiny.STATIC)
    monkeypatch.setattr(transfer, 'DYNAMIC', tiny.NAME)
    monkeypatch.setattr(transfer, 'RESULT', tmp_path / 'results' / 'digits.json')
    arguments = transfer.parse_transfer(['--seeds', '2', '--output', str(tmp_path / 'runs')])
    transfer.main(**vars(arguments))
    result = json.loads((tmp_path / 'results' / 'digits.json').read_text())
    assert result['runs'].keys() == {'scratch', 'static', 'inflated'}
    assert result['start']['init'] == [None, None]
    for name, runs in result['runs'].items():
        assert len(runs['top1']) == 2 and runs['top1_mean'] == statistics.mean(runs['top1'])
        assert runs['recipe']['epochs'] == transfer.EPOCHS and runs['recipe']['batch_size'] == 64
        assert [init and init['weights'] for init in runs['init']] == (
            [None, None] if name == 'scratch' else ['start_0', 'start_1'])
    assert result['runs']['static']['parameters'] < result['runs']['inflated']['parameters']
    assert not list((tmp_path / 'runs').rglob('checkpoints'))

    monkeypatch.setattr(_runs, 'train', lambda *args: pytest.fail('it is finished'))
    capsys.readouterr()
    transfer.main(**vars(arguments))
    assert f'| inflated | {result["runs"]["inflated"]["top1_mean"]:.2f} ± ' in capsys.readouterr().out
    monkeypatch.setattr(transfer, 'EPOCHS', 5)
    with pytest.raises(SystemExit, match='scratch_0 holds a run with other settings: name another --output'):
        transfer.main(**vars(arguments))


def test_the_page_says_what_the_record_says():
    result = json.loads(transfer.RESULT.read_text())
    page = (CHECKOUT / 'recipes' / 'README.md').read_text()
    for name, runs in result['runs'].items():
        row = f'{runs["top1_mean"]:.2f} ± {runs["top1_std"]:.2f} | {statistics.mean(runs["loss"]):.3f} |'
        assert row in page, name
