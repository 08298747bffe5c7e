"""Python processes that start in a moment, for tests: forks of one that has imported what they all would import.

    done = processes.run('recipes/publish.py', '--run', 'run', cwd=checkout, env=dict(os.environ, HF_TOKEN=token))
    assert done.returncode == 0, done.stderr

A new interpreter takes about five seconds to import PyTorch, timm, accelerate, datasets and transformers. Python's fork
server does it once. It imports neither fmd_timm nor a recipe: each process finds its own by PYTHONPATH and its script.

What these libraries read from the environment while they are imported (HF_ENDPOINT, HF_HOME, OMP_NUM_THREADS) is what
the tests have, whatever `env` says. A test of what is imported needs a new interpreter.
"""
import functools
import json
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from pathlib import Path

IMPORTED = [
    'accelerate', 'datasets', 'sklearn.datasets', 'sklearn.model_selection', 'timm', 'timm.data', 'timm.loss',
    'timm.optim', 'timm.scheduler', 'timm.task', 'timm.utils', 'torch.utils.flop_counter', 'torch.utils.tensorboard',
    'torchcodec.decoders', 'torchvision', 'transformers.models.timm_wrapper.modeling_timm_wrapper',
]
START_METHOD = 'forkserver'
FORKS = multiprocessing.get_context(START_METHOD)
FORKS.set_forkserver_preload(IMPORTED)


def run(
        *command: str | Path,
        cwd: str | Path = '.',
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
) -> subprocess.CompletedProcess:
    """`python *command`, a script, -c or -m: as `subprocess.run(..., capture_output=True, text=True)` does it.

    Args:
        env: All its environment variables; those of this process if left out.
        timeout: In seconds; a process that is still there is killed.

    Raises:
        subprocess.TimeoutExpired: It was killed.
    """
    return _run_all(command, cwd, [os.environ if env is None else env], timeout)[0]


def launch(
        processes: int,
        *command: str | Path,
        cwd: str | Path = '.',
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
) -> list[subprocess.CompletedProcess]:
    """So many at once, with the variables of torchrun by which they find each other. One that fails ends all."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    shared = dict(
        os.environ if env is None else env, MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes))
    ranks = [dict(shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    return _run_all(command, cwd, ranks, timeout)


def _run_all(command, cwd, environments, timeout) -> list[subprocess.CompletedProcess]:
    command = [str(argument) for argument in command]
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder, f'stdout{i}'), Path(folder, f'stderr{i}')) for i in range(len(environments))]
        started = [
            FORKS.Process(target=_become, args=(command, str(cwd), dict(env), _standard_path(), *paths))
            for env, paths in zip(environments, files)
        ]
        for process in started:
            process.start()
        try:
            in_time = _wait(started, time.monotonic() + timeout)
        finally:
            for process in started:
                process.kill()
                process.join()
        done = [
            subprocess.CompletedProcess([sys.executable, *command], process.exitcode, *(f.read_text() for f in paths))
            for process, paths in zip(started, files)
        ]
    if not in_time:
        raise subprocess.TimeoutExpired(command, timeout, done[0].stdout, done[0].stderr)
    return done


def _wait(started, deadline: float) -> bool:
    """Until all have ended or one has failed, which the others may wait for; False at the deadline."""
    while waiting := [process for process in started if process.exitcode is None]:
        if any(process.exitcode for process in started):
            break
        if not multiprocessing.connection.wait(
                [process.sentinel for process in waiting], max(0, deadline - time.monotonic())):
            return False
    return True


def _become(command, cwd, env, standard_path, stdout, stderr):
    """In the fork: do what `python *command` would."""
    for path, stream in (stdout, sys.stdout), (stderr, sys.stderr):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(cwd)
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # where a process that it spawns finds the script
    os.environ.clear()
    os.environ.update(env)
    extra = [os.path.abspath(path) for path in env.get('PYTHONPATH', '').split(os.pathsep) if path]
    first, *rest = command

    def begin(argv, folder):
        sys.argv[:], sys.path[:] = argv, [folder, *extra, *standard_path]

    if first == '-m':
        begin(rest, os.getcwd())
        return runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    if first == '-c':
        begin(['-c', *rest[1:]], '')
        code = rest[0]
    else:
        main.__file__ = os.path.abspath(first)
        begin(command, os.path.dirname(main.__file__))
        code = compile(Path(first).read_bytes(), main.__file__, 'exec')
    exec(code, main.__dict__)


@functools.cache
def _standard_path() -> list[str]:
    """sys.path of a new interpreter, without what a script, PYTHONPATH and pytest put in front."""
    command = [sys.executable, '-I', '-c', 'import json, sys; print(json.dumps(sys.path))']
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
