"""processes.py: a fork does what an interpreter of its own does with the same command."""
import json
import os
import subprocess
import sys
from textwrap import dedent

import processes
import pytest

SCRIPT = '''
import json, os, sys
file, stdin = globals().get('__file__'), sys.stdin.read()
print(json.dumps([sys.argv, sys.path, os.getcwd(), dict(os.environ), __name__, file, stdin]))
print('a warning', file=sys.stderr)
sys.exit(int(sys.argv[-1]))
'''


@pytest.mark.parametrize('command', [
    ['scripts/script.py', '--name', 'value', '3'], ['-m', 'package.module', '0'], ['-c', SCRIPT, '1'],
], ids=['script', '-m', '-c'])
def test_a_fork_sees_what_a_new_interpreter_sees(command, tmp_path):
    for name in 'scripts/script.py', 'package/module.py':
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(SCRIPT)
    env = dict(LC_ALL='C.UTF-8', PYTHONPATH=f'{tmp_path}{os.pathsep}relative')
    done = processes.run(*command, cwd=tmp_path, env=env)
    expected = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert json.loads(done.stdout) == json.loads(expected.stdout)
    assert (done.returncode, done.stderr) == (expected.returncode, expected.stderr)


def test_it_has_imported_the_libraries_and_nothing_of_ours():
    done = processes.run('-c', dedent('''
        import sys
        print({'torch', 'timm', 'accelerate', 'datasets', 'transformers'} - set(sys.modules))
        print([name for name in sys.modules if name.startswith('fmd_timm') or name in ('train', 'conftest')])
    '''))
    assert done.stdout.split() == ['set()', '[]'], done.stderr


@pytest.mark.parametrize('code, returncode, stderr', [
    ('raise ValueError("a reason")', 1, 'ValueError: a reason'),
    ('raise SystemExit("a refusal")', 1, 'a refusal'),
    ('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', -9, ''),
])
def test_a_failure_shows(code, returncode, stderr):
    done = processes.run('-c', code)
    assert done.returncode == returncode and stderr in done.stderr


def test_one_that_does_not_end_is_killed(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired) as error:
        processes.run('-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)', timeout=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(error.value.stdout), 0)


def test_several_find_each_other_and_end_with_the_one_that_fails():
    script = '''if True:
        import sys, time
        import torch.distributed as dist
        dist.init_process_group('gloo')
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, dist.get_rank())
        print(ranks, flush=True)
        if sys.argv[1:] == [str(dist.get_rank())]:
            sys.exit('broken')
        dist.barrier()
    '''
    assert [(done.returncode, done.stdout) for done in processes.launch(2, '-c', script)] == [(0, '[0, 1]\n')] * 2
    first, second = processes.launch(2, '-c', script, '1')
    assert first.returncode and second.returncode == 1 and second.stderr == 'broken\n'
