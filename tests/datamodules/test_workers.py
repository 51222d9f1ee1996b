"""Loading processes that die: what the training process says."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from datamodules.streaming import Loader
from datamodules.workers import explained, prepare_worker
from fewstep.errors import FewstepError

from shard_files import FakeTrainer, shards


class Unsendable:
    """Something that cannot be handed to another process."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __reduce__(self) -> Any:
        raise RuntimeError(self.words)


class Rows(Dataset[Any]):
    """Tensors, until a row that is something else."""

    def __init__(self, then: Any = None) -> None:
        self.then = then

    def __len__(self) -> int:
        return 400

    def __getitem__(self, number: int) -> Any:
        if number < 8 or self.then is None:
            return torch.full((100,), number)
        if isinstance(self.then, Exception):
            raise self.then
        return self.then


def loader(then: Any = None) -> Loader:
    made = Loader(Rows(then), batch_size=None, num_workers=2, worker_init_fn=prepare_worker)
    made.timeout = 60  # a test that would hang fails
    return made


def workers_of(batches: Iterator[Any]) -> list[Any]:
    return list(batches.batches._workers)  # type: ignore[attr-defined]


def drain(batches: Iterator[Any]) -> FewstepError:
    with pytest.raises(FewstepError) as stopped:
        for _ in batches:
            pass
    return stopped.value


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_worker_ends_in_one_message_with_the_remedies(
    number: signal.Signals, folder: Path
) -> None:
    data = shards(folder, FakeTrainer(), batch_size=1, num_workers=2)
    batches = iter(data.train_dataloader())
    next(batches)
    os.kill(workers_of(batches)[0].pid, number)
    message = str(drain(batches))
    assert number.name in message
    for words in ("num_workers", "prefetch_batches", "memory", "/dev/shm", "--ckpt_path last"):
        assert words in message
    assert len(message.splitlines()) == 3
    accepted = Path(sys.modules[type(data).__module__].__file__ or "").read_text()
    assert "        prefetch_batches: int" in accepted
    assert "        num_workers: int" in accepted


def test_a_death_that_surfaces_at_any_other_line_is_explained_too() -> None:
    batches = iter(loader())
    next(batches)
    with pytest.raises(RuntimeError) as met:  # noqa: PT012 - it comes out of the loop
        os.kill(workers_of(batches)[0].pid, signal.SIGKILL)
        signal.sigtimedwait([signal.SIGUSR2], 30)  # until the system tells of the death
    batches.batches._shutdown_workers()  # type: ignore[attr-defined]
    clear = explained(met.value)
    assert clear is not None
    assert "killed by SIGKILL" in str(clear)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>", "/dev/shm is full"),
        ("no way to send this", "gone with exit status 1"),
    ],
)
def test_a_batch_that_cannot_be_sent_does_not_hang_the_run(words: str, said: str) -> None:
    assert said in str(drain(iter(loader(Unsendable(words)))))


@pytest.mark.parametrize("error", [EOFError("of data"), ConnectionResetError("by a source")])
def test_errors_that_a_worker_raises_stay_what_they_are(error: Exception) -> None:
    batches = iter(loader(error))
    with pytest.raises(type(error), match="Caught"):
        for _ in batches:
            pass


def test_errors_of_other_things_are_not_explained() -> None:
    others = [RuntimeError("CUDA out of memory"), ConnectionResetError("by a source"), EOFError()]
    assert [explained(error) for error in others] == [None] * 3
    dead = explained(ConnectionResetError(104, "Connection reset by peer"), [])
    assert "for an unknown reason" in str(dead)


FULL = """
import torch
from fewstep.errors import FewstepError
from test_workers import Rows, loader
try:
    for _ in loader(torch.ones(1_000_000)): pass
except FewstepError as error:
    print("explained:", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare to mount with")
def test_a_full_dev_shm_is_named_as_the_cause() -> None:
    root = Path(__file__).resolve().parents[2]
    mount = "mount -t tmpfs -o size=2m none /dev/shm"
    in_namespace = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*in_namespace, mount], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small /dev/shm is not allowed here")
    path = os.pathsep.join(map(str, [root, root / "tests", Path(__file__).parent]))
    found = subprocess.run(
        [*in_namespace, f'{mount} && exec "$0" -c "$1"', sys.executable, FULL],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "explained: A data-loading process is" in found.stdout, found.stderr[-2000:]
    assert "/dev/shm is full" in found.stdout
