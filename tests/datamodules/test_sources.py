from __future__ import annotations

import http.client
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from torch.utils.data import DataLoader, Dataset

from datamodules.sources import Sources, cache, prefetch, remote
from fewstep.errors import FewstepError

from servers import Fault, FaultyProxy, FaultyServer, GoogleServer, HubServer, running

MIB = 2**20
ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")


def noise(seed: int, size: int = MIB) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    """Five shards of 1 MiB over http."""
    with running(FaultyServer()) as server:
        server.files = {f"/{letter}.tar": noise(seed) for seed, letter in enumerate("abcde")}
        yield server


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    """Buckets ``one`` and ``two`` of a real S3 server, and its port."""
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    port = moto.get_host_and_port()[1]
    connection = http.client.HTTPConnection("127.0.0.1", port)
    objects = {f"/{bucket}/set/{n}.tar": noise(n) for bucket in ("one",) for n in range(3)}
    objects |= {"/one/set/0.tar.index": b"index", "/two/set/0.tar": noise(7)}
    for path, data in [("/one", b""), ("/two", b""), *objects.items()]:
        connection.request("PUT", path, data)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
    yield port
    connection.close()
    moto.stop()


@pytest.fixture
def s3(moto: int) -> Iterator[FaultyProxy]:
    with running(FaultyProxy(moto)) as proxy:
        assert isinstance(proxy, FaultyProxy)
        yield proxy


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Sources]:
    """Makes impatient sources with a cache of this test's."""

    def made(s3: FaultyProxy | None = None, **options: Any) -> Sources:
        if s3 is not None:
            options["storage_options"] = {"s3": {"key": "k", "secret": "s", "endpoint_url": s3.url}}
        sources = Sources(**{"cache": str(tmp_path / "cache"), **options})
        sources.patience.base_delay = 0.01
        sources.patience.timeout = 1.0
        return sources

    return made


Make = Callable[..., Sources]


def shards_in(sources: Sources) -> list[Path]:
    return sorted((sources.root / "shards").iterdir())


def retries(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno == logging.WARNING for record in caplog.records)


def eventually(true: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def interpreter(sources: Sources, code: str) -> subprocess.Popen[str]:
    """A fresh interpreter, as spawned workers are, that is handed the pickled ``sources``."""
    # The package's own __init__ would import all of torch.
    code = (
        "import os, pickle, sys, time, types, logging\n"
        "package = types.ModuleType('datamodules'); package.__path__ = ['datamodules']\n"
        "sys.modules['datamodules'] = package\n"
        f"sources = pickle.loads({pickle.dumps(sources)!r})\n{code}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# ---------------------------------------------------------------------- names


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("x/a-0.tar", "x/a-1.tar", "x/b-0.tar", "x/notes.txt", "y/{odd}.tar"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("x", ["x/a-0.tar", "x/a-1.tar", "x/b-0.tar"]),
        ("x/{b,a}-0.tar", ["x/a-0.tar", "x/b-0.tar"]),
        ("x/a-{0..1}.tar", ["x/a-0.tar", "x/a-1.tar"]),
        (["x/b*.tar", "x/a-?.tar"], ["x/b-0.tar", "x/a-0.tar", "x/a-1.tar"]),
        ("file:x/a-0.tar", ["x/a-0.tar"]),
        ("y/{odd}.tar", ["y/{odd}.tar"]),
        ("s3://b/k-{8..10}.tar", ["s3://b/k-10.tar", "s3://b/k-8.tar", "s3://b/k-9.tar"]),
        ("{http,https}://nowhere.invalid/a.tar?token=x", None),
    ],
)
def test_patterns_stand_for_their_files_in_order(
    files: Path, make: Make, patterns: str | list[str], expected: list[str] | None
) -> None:
    if expected is None:  # no traffic, or these would fail
        expected = [f"{s}://nowhere.invalid/a.tar?token=x" for s in ("http", "https")]
    assert make().expand(patterns) == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("nowhere/*.tar", r"the folder 'nowhere' does not exist\. Set data"),
        ("empty", r"the folder 'empty' exists but holds none \(it is empty\)"),
        ("x/c*.tar", r"holds none \(it holds a-0.tar, a-1.tar, b-0.tar, notes.txt\)"),
        ("x/a-{0..2}.tar", r"No shards match 'x/a-2.tar'"),
        (["x/a-*.tar", "./x/a-1.tar"], "'x/a-1.tar' is named twice"),
        ("x/a-{0..1.tar}}", "braces|No shards match"),
        ("pipe:touch hacked", "would run a shell command.*file:, http://, https://, s3://"),
        ("{pipe,x}:touch hacked", "would run a shell command"),
        ("ftp://host/a.tar", r"'ftp:' is no kind of address.*s3://, gs://, gcs://, hf://"),
        ("simplecache::s3://b/a.tar", "'simplecache:' is no kind"),
        ("http://host/*.tar", r"http has no folders; name the files with braces"),
        ("https://host/dir/", "http has no folders"),
        ([], "No shards are named"),
    ],
)
def test_wrong_patterns_are_refused_with_a_remedy(
    files: Path, make: Make, patterns: str | list[str], message: str
) -> None:
    with pytest.raises(FewstepError, match=message):
        make().expand(patterns)
    assert not (files / "hacked").exists()


@pytest.mark.parametrize("address", ["pipe:touch hacked", "ftp://host/a.tar", "s3:bucket"])
def test_no_way_in_takes_a_forbidden_address(files: Path, make: Make, address: str) -> None:
    sources = make()
    for way in (sources.local, sources.is_local, sources.descriptor):
        with pytest.raises(FewstepError, match="Cannot read"):
            way(address)
    with pytest.raises(FewstepError, match="Cannot read"):
        sources.prefetch([address])
    assert not (files / "hacked").exists()


def test_environment_variables_of_webdataset_change_nothing(
    server: FaultyServer, make: Make, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", "http://=pipe:touch hacked; echo ")
    assert make().local(f"{server.url}/a.tar").read_bytes() == server.files["/a.tar"]
    assert not (files / "hacked").exists()


def test_local_files_are_themselves(files: Path, make: Make) -> None:
    sources = make()
    (files / "x/a-0.tar.index").write_text("index")
    assert sources.local("x/a-0.tar") == Path("x/a-0.tar")
    assert sources.is_local("file:x/a-0.tar")
    assert not sources.is_local("s3://b/k")
    assert sources.companion("x/a-0.tar", ".index") == Path("x/a-0.tar.index")
    assert sources.companion("x/a-1.tar", ".index") is None
    with pytest.raises(FewstepError, match="does not exist"):
        sources.descriptor("x/none.tar")


def test_own_files_are_told_apart_by_address_and_endpoint(files: Path, make: Make) -> None:
    sources = make()
    assert sources.own("x/a-0.tar", ".index") == sources.own(str(files / "x/a-0.tar"), ".index")
    paths = {sources.own(f"s3://{bucket}/0.tar", ".index") for bucket in ("one", "two")}
    elsewhere = make(storage_options={"s3": {"endpoint_url": "http://elsewhere"}})
    paths.add(elsewhere.own("s3://one/0.tar", ".index"))
    assert len(paths) == 3
    assert all(path.name.endswith("-0.tar.index") for path in paths)


# ---------------------------------------------------------------------- one file over http


def test_a_shard_is_brought_in_once(server: FaultyServer, make: Make) -> None:
    sources = make()
    for _ in range(2):
        assert sources.local(f"{server.url}/a.tar").read_bytes() == server.files["/a.tar"]
    assert make().local(f"{server.url}/a.tar").read_bytes() == server.files["/a.tar"]
    assert server.requests == [("GET", "/a.tar", None)]


CUT = Fault(cut=300_000, stall=0.1)  # time for all that was sent to arrive


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([Fault(503), Fault(429), Fault(500)], [None] * 4),
        ([CUT], [None, "bytes=300000-"]),
        ([Fault(cut=0)], [None, None]),
        ([Fault(cut=300_000, stall=3.0)], [None, "bytes=300000-"]),
        # The tries that get on do not count against those that fail.
        ([CUT, Fault(cut=400_000, stall=0.1), Fault(cut=1, stall=0.1), Fault(503)], None),
    ],
    ids=["busy", "cut", "cut at once", "stalled", "cut often"],
)
def test_transient_faults_are_tried_again(
    server: FaultyServer,
    make: Make,
    faults: list[Fault],
    ranges: list[str | None] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.faults["/a.tar"].extend(faults)
    sources = make(attempts=4 if ranges else 3)
    assert sources.local(f"{server.url}/a.tar").read_bytes() == server.files["/a.tar"]
    assert retries(caplog) == len(faults)
    assert ranges is None or server.gets("/a.tar") == ranges


def test_delays_grow_and_vary_up_to_a_bound(make: Make) -> None:
    patience = make().patience
    patience.base_delay, patience.max_delay = 1.0, 20.0
    for failures, middle in [(1, 1), (2, 2), (4, 8), (9, 20)]:
        delays = [patience.delay(failures) for _ in range(200)]
        assert 0.5 * middle <= min(delays) < 0.75 * middle
        assert 1.25 * middle < max(delays) <= 1.5 * middle


def test_without_ranges_it_begins_anew(server: FaultyServer, make: Make) -> None:
    server.ranges = False
    server.faults["/a.tar"].extend([CUT])
    assert make().local(f"{server.url}/a.tar").read_bytes() == server.files["/a.tar"]
    assert server.gets("/a.tar") == [None, "bytes=300000-"]


def test_a_file_that_changes_half_way_is_not_mixed(server: FaultyServer, make: Make) -> None:
    server.faults["/a.tar"].append(CUT)
    sources = make()
    sources.patience.base_delay = 1.0
    got: list[bytes] = []
    thread = threading.Thread(
        target=lambda: got.append(sources.local(f"{server.url}/a.tar").read_bytes())
    )
    thread.start()
    eventually(lambda: len(server.requests) == 1)
    server.files["/a.tar"] = noise(99, MIB // 2)
    thread.join()
    assert got == [server.files["/a.tar"]]


def test_it_gives_up_after_the_attempts_and_accepts_no_part(
    server: FaultyServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    server.ranges = False  # so that no try gets further than the first
    server.faults["/a.tar"].extend([CUT] * 10)
    sources = make(attempts=3)
    message = rf"Gave up on '{server.url}/a.tar' after 3 attempts .* failed with \w+Error"
    with pytest.raises(FewstepError, match=message):
        sources.local(f"{server.url}/a.tar")
    assert len(server.requests) == 3
    assert retries(caplog) == 2
    assert shards_in(sources) == []


def test_a_dead_server_is_given_up(make: Make) -> None:
    with running(FaultyServer()) as gone:
        pass
    with pytest.raises(FewstepError, match="after 3 attempts"):
        make(attempts=3).local(f"{gone.url}/a.tar")


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "does not exist"), (403, "may not be read"), (401, "credentials"), (400, "HTTP 400")],
)
def test_lasting_faults_are_reported_at_once(
    server: FaultyServer, make: Make, status: int, message: str
) -> None:
    server.faults["/a.tar"].append(Fault(status))
    with pytest.raises(FewstepError, match=message) as caught:
        make().local(f"{server.url}/a.tar?signature=secret")
    assert "/a.tar" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(server.requests) == 1


def test_what_cannot_be_known_to_be_whole_is_refused(server: FaultyServer, make: Make) -> None:
    server.files["/login.html"] = b"<html>"
    with pytest.raises(FewstepError, match="is a web page"):
        make().local(f"{server.url}/login.html")
    server.no_length = True
    with pytest.raises(FewstepError, match="does not announce the file's size"):
        make().local(f"{server.url}/a.tar")


def test_users_headers_are_sent_and_empty_files_are_files(server: FaultyServer, make: Make) -> None:
    server.files["/none.tar"] = b""
    sources = make(storage_options={"https": {"headers": {"If-Range": "mine"}}})
    assert sources.local(f"{server.url}/none.tar").read_bytes() == b""


def test_an_unwritable_cache_is_named(server: FaultyServer, make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FewstepError, match=r"Cannot write to the cache folder.*FEWSTEP_CACHE"):
        make(cache=str(tmp_path / "file" / "cache")).local(f"{server.url}/a.tar")


# ---------------------------------------------------------------------- room


def test_the_least_recently_used_make_room(server: FaultyServer, make: Make) -> None:
    sources = make(cache_gib=3.5 * MIB / 2**30)
    for letter in "abcad":  # a is used again, so b is the oldest when d comes
        sources.local(f"{server.url}/{letter}.tar")
        assert sum(path.stat().st_size for path in shards_in(sources)) <= 3.5 * MIB
        time.sleep(0.02)
    assert {path.name[-5] for path in shards_in(sources)} == set("acd")


def test_a_shard_larger_than_the_cache_is_an_error(server: FaultyServer, make: Make) -> None:
    with pytest.raises(FewstepError, match=r"larger than the whole cache.*raise data.*cache_gib"):
        make(cache_gib=0.5 * MIB / 2**30).local(f"{server.url}/a.tar")


def test_room_is_taken_as_soon_as_a_download_begins(server: FaultyServer, make: Make) -> None:
    sources = make(cache_gib=1.5 * MIB / 2**30)
    server.pause = 0.05
    first, second = (f"{server.url}/{letter}.tar" for letter in "ab")
    thread = threading.Thread(target=sources.local, args=(first,))
    thread.start()
    eventually(lambda: (sources.root / "shards").exists() and bool(shards_in(sources)))
    with pytest.raises(cache.BusyError):
        sources.cache.shard(second, "b", wait=False)
    assert sources.local(second).read_bytes() == server.files["/b.tar"]  # waits for room
    thread.join()
    assert [path.name[-5] for path in shards_in(sources)] == ["b"]


def test_a_copy_that_is_open_survives_its_removal(server: FaultyServer, make: Make) -> None:
    sources = make(cache_gib=1.5 * MIB / 2**30)
    descriptor = sources.descriptor(f"{server.url}/a.tar")
    sources.local(f"{server.url}/b.tar")
    assert [path.name[-5] for path in shards_in(sources)] == ["b"]
    assert os.pread(descriptor, MIB, 0) == server.files["/a.tar"]
    os.close(descriptor)


def _fetch_all(sources: Sources, addresses: list[str], expected: list[bytes], results: Any) -> None:
    good = 0
    for address, data in zip(addresses, expected, strict=True):
        descriptor = sources.descriptor(address)
        good += os.pread(descriptor, 2 * MIB, 0) == data
        os.close(descriptor)
    results.put(good)


def in_processes(sources: Sources, lists: list[list[str]], server: FaultyServer) -> list[int]:
    results = FORK.SimpleQueue()
    processes = []
    for addresses in lists:
        expected = [server.files[address.removeprefix(server.url)] for address in addresses]
        processes.append(
            FORK.Process(target=_fetch_all, args=(sources, addresses, expected, results))
        )
        processes[-1].start()
    good = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return good


def test_processes_that_want_the_same_shard_bring_it_in_once(
    server: FaultyServer, make: Make
) -> None:
    server.pause = 0.02
    address = f"{server.url}/a.tar"
    assert in_processes(make(), [[address]] * 3, server) == [1, 1, 1]
    assert server.gets("/a.tar") == [None]


def test_processes_that_crowd_a_cache_all_get_on_within_its_bound(
    server: FaultyServer, make: Make
) -> None:
    sources = make(cache_gib=2.5 * MIB / 2**30)
    server.pause = 0.002
    addresses = [f"{server.url}/{letter}.tar" for letter in "abcde"]
    sizes: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            total = 0
            for path in (sources.root / "shards").glob("*"):
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    continue
            sizes.append(total)

    (sources.root / "shards").mkdir(parents=True)
    watcher = threading.Thread(target=watch)
    watcher.start()
    lists = [addresses[shift:] + addresses[:shift] for shift in range(4)]
    assert in_processes(sources, lists, server) == [5] * 4
    done.set()
    watcher.join()
    # A copy is renamed and another removed between two looks of one round: it may be seen twice.
    assert sorted(sizes)[int(0.9 * len(sizes))] <= 2.5 * MIB
    assert sum(path.stat().st_size for path in shards_in(sources)) <= 2.5 * MIB


# ---------------------------------------------------------------------- processes that end


def test_a_killed_download_blocks_nobody_even_with_children_of_its_own(
    server: FaultyServer, make: Make
) -> None:
    server.pause = 0.2
    sources = make(cache_gib=1.5 * MIB / 2**30)
    addresses = [f"{server.url}/{letter}.tar" for letter in "ab"]
    process = interpreter(
        sources,
        f"sources.prefetch([{addresses[0]!r}])\n"
        "while not any(p.stat().st_blocks for p in sources.root.glob('shards/*')):"
        " time.sleep(0.01)\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(30)\n",
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        assert ".partial-" in shards_in(sources)[0].name
        server.pause = 0.0
        # The other shard needs the room of the part that was left.
        assert sources.local(addresses[1]).read_bytes() == server.files["/b.tar"]
        assert len(shards_in(sources)) == 1
        assert sources.local(addresses[0]).read_bytes() == server.files["/a.tar"]
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_forked_amid_a_download_does_not_keep_its_lock(
    server: FaultyServer, make: Make
) -> None:
    server.pause = 0.02
    sources = make()
    sources.prefetch([f"{server.url}/a.tar"])
    eventually(lambda: server.gets("/a.tar") == [None])
    child = FORK.Process(target=time.sleep, args=(30,))
    child.start()
    try:
        copy = sources.local(f"{server.url}/a.tar")
        copy.unlink()
        thread = threading.Thread(target=sources.local, args=(f"{server.url}/a.tar",), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    finally:
        child.kill()
        child.join()


def test_prefetching_does_not_delay_the_end_of_a_process(server: FaultyServer, make: Make) -> None:
    server.pause = 1.0  # 16 s for the whole
    process = interpreter(
        make(),
        f"sources.prefetch(['{server.url}/a.tar', '{server.url}/b.tar', '{server.url}/c.tar'])\n"
        "while not any(p.stat().st_blocks for p in sources.root.glob('shards/*')):"
        " time.sleep(0.01)\n"
        "print('end', flush=True)\n",
    )
    assert process.stdout is not None
    process.stdout.readline()
    start = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert (process.returncode, errors) == (0, "")


# ---------------------------------------------------------------------- workers


class Contents(Dataset[bytes]):
    def __init__(self, sources: Sources, addresses: list[str]) -> None:
        self.sources, self.addresses = sources, addresses

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, number: int) -> bytes:
        return self.sources.local(self.addresses[number]).read_bytes()


def test_forked_workers_read_what_their_parent_has_begun_to(
    server: FaultyServer, s3: FaultyProxy, make: Make
) -> None:
    sources = make(s3)
    sources.local(f"{server.url}/a.tar")
    sources.local("s3://one/set/0.tar")
    sources.prefetch([f"{server.url}/b.tar"])
    addresses = [*(f"{server.url}/{x}.tar" for x in "bcde"), "s3://one/set/1.tar"]
    expected = [server.files[f"/{x}.tar"] for x in "bcde"] + [noise(1)]
    loader = DataLoader(
        Contents(sources, addresses),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=20,
    )
    assert list(loader) == expected
    # And the parent's connections still work.
    server.files["/f.tar"] = noise(50)
    assert sources.local(f"{server.url}/f.tar").read_bytes() == noise(50)
    assert sources.local("s3://one/set/2.tar").read_bytes() == noise(2)


def test_a_spawned_worker_reads_too(server: FaultyServer, make: Make) -> None:
    sources = make()
    sources.local(f"{server.url}/a.tar")
    process = interpreter(sources, f"print(sum(sources.local('{server.url}/b.tar').read_bytes()))")
    output, errors = process.communicate(timeout=30)
    assert errors == ""
    assert int(output) == sum(server.files["/b.tar"])


def test_prefetching_brings_each_shard_once_and_is_silent_about_faults(
    server: FaultyServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    sources = make()
    server.pause = 0.01
    addresses = [f"{server.url}/{name}.tar" for name in ("a", "b", "none")]
    start = time.monotonic()
    for _ in range(3):
        sources.prefetch(addresses)
    assert time.monotonic() - start < 0.1
    assert prefetch._prefetcher.value.tasks.qsize() <= len(addresses)
    assert sources.local(addresses[1]).read_bytes() == server.files["/b.tar"]
    eventually(lambda: len([p for p in shards_in(sources) if ".partial" not in p.name]) == 2)
    assert server.gets("/a.tar") == server.gets("/b.tar") == [None]
    with pytest.raises(FewstepError, match="does not exist"):
        sources.local(addresses[2])


# ---------------------------------------------------------------------- side-cars


def test_side_cars_are_kept_and_told_apart(server: FaultyServer, make: Make) -> None:
    server.files |= {"/x/0.tar.index": b"x", "/y/0.tar.index": b"y"}
    sources = make(cache_gib=1.5 * MIB / 2**30)
    for _ in range(2):
        for folder in "xy":
            found = sources.companion(f"{server.url}/{folder}/0.tar?download=1", ".index")
            assert found is not None
            assert found.read_bytes() == folder.encode()
        sources.local(f"{server.url}/a.tar")
        sources.local(f"{server.url}/b.tar")
    assert server.gets("/x/0.tar.index") == [None]


@pytest.mark.parametrize("status", [404, 403])
def test_a_side_car_that_is_not_there_is_none(
    server: FaultyServer, make: Make, status: int
) -> None:
    server.faults["/a.tar.index"].append(Fault(status))
    assert make().companion(f"{server.url}/a.tar", ".index") is None


def test_a_side_car_out_of_reach_is_an_error(server: FaultyServer, make: Make) -> None:
    server.faults["/a.tar.index"].extend([Fault(503)] * 3)
    with pytest.raises(FewstepError, match="Gave up"):
        make(attempts=3).companion(f"{server.url}/a.tar", ".index")


# ---------------------------------------------------------------------- s3


SLOW_DOWN = Fault(503, body=b"<Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>")


@pytest.mark.parametrize(
    ("method", "faults"),
    [
        ("", [SLOW_DOWN, Fault(500)]),
        ("HEAD ", [Fault(503)]),
        ("", [Fault(cut=100_000)]),
        ("", [Fault(cut=0), Fault(cut=100_000, stall=3.0)]),
        ("", [Fault(206)]),  # well-formed, but without a byte
    ],
    ids=["slow down", "slow head", "cut", "stalled", "empty"],
)
def test_s3_shards_come_whole_through_faults(
    s3: FaultyProxy,
    make: Make,
    method: str,
    faults: list[Fault],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote, "CHUNK", MIB // 4)
    s3.faults[f"{method}/one/set/0.tar"].extend(faults)
    assert make(s3).local("s3://one/set/0.tar").read_bytes() == noise(0)
    # Each fault is met by us, not by retries inside botocore or s3fs that multiply ours.
    assert retries(caplog) == len(faults)
    assert len(s3.gets("/one/set/0.tar")) == 4 + (0 if method else len(faults))


def test_an_s3_download_goes_on_where_it_broke_off(
    s3: FaultyProxy, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK", MIB // 2)
    s3.faults["/one/set/0.tar"].extend([Fault(), Fault(503)])
    assert make(s3).local("s3://one/set/0.tar").read_bytes() == noise(0)
    halves = ["bytes=0-524287", "bytes=524288-1048575"]
    assert s3.gets("/one/set/0.tar") == [*halves, halves[1]]


def test_s3_names_come_from_globs_and_folders(s3: FaultyProxy, make: Make) -> None:
    sources = make(s3)
    shards = [f"s3://one/set/{n}.tar" for n in range(3)]
    assert sources.expand("s3://one/set/*.tar") == shards
    assert sources.expand("s3://one/set/") == shards
    assert sources.expand("s3://one/s*t/[12].tar") == shards[1:]
    with pytest.raises(FewstepError, match=r"'s3://one/set/' exists but holds none .*0.tar.index"):
        sources.expand("s3://one/set/*.zip")
    with pytest.raises(FewstepError, match="does not exist"):
        sources.expand("s3://three/*.tar")
    s3.faults["/one"].append(Fault(503))
    s3.faults["/one/"].append(Fault(503))
    assert make(s3).expand("s3://one/set/*.tar") == shards


def test_shards_of_the_same_name_in_two_buckets_are_told_apart(s3: FaultyProxy, make: Make) -> None:
    sources = make(s3)
    assert sources.local("s3://one/set/0.tar").read_bytes() == noise(0)
    assert sources.local("s3://two/set/0.tar").read_bytes() == noise(7)
    found = sources.companion("s3://one/set/0.tar", ".index")
    assert found is not None
    assert found.read_bytes() == b"index"
    assert sources.companion("s3://two/set/0.tar", ".index") is None


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        ("s3://one/none.tar", None, "'s3://one/none.tar' does not exist"),
        ("s3://three/0.tar", None, "does not exist"),
        ("s3://one/set/0.tar", 403, "may not be read .*anon: true"),
    ],
)
def test_lasting_s3_faults_are_reported_at_once(
    s3: FaultyProxy, make: Make, address: str, status: int | None, message: str
) -> None:
    if status is not None:
        s3.faults[f"HEAD {address.removeprefix('s3:/')}"].append(Fault(status))
    with pytest.raises(FewstepError, match=message):
        make(s3).local(address)
    assert sum(method == "GET" and "tar" in path for method, path, _ in s3.requests) == 0


@pytest.mark.parametrize("kind", ["gs", "hf"])
def test_gs_and_hf_shards_are_found_and_read(
    make: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"gs": "gcsfs", "hf": "huggingface_hub"}[kind])
    monkeypatch.setattr(remote, "CHUNK", MIB // 2)
    with running({"gs": GoogleServer, "hf": HubServer}[kind]()) as server:
        server.files = {f"set/{n}.tar": noise(n) for n in range(2)}
        options = {
            "gs": {"endpoint_url": server.url, "token": "anon"},
            "hf": {"endpoint": server.url, "token": False},
        }
        sources = make(storage_options={kind: options[kind]})
        base = {"gs": "gs://bucket", "hf": "hf://datasets/org/set"}[kind]
        shards = [f"{base}/set/{n}.tar" for n in range(2)]
        assert sources.expand(f"{base}/set/*.tar") == sources.expand(f"{base}/set/") == shards
        assert sources.local(shards[1]).read_bytes() == noise(1)
        assert sources.companion(shards[0], ".index") is None
        with pytest.raises(FewstepError, match="does not exist"):
            sources.local(f"{base}/none.tar")


# ---------------------------------------------------------------------- options


def test_a_missing_package_names_the_extra(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(FewstepError, match=r"pip install 'fewstep\[gcs\]'"):
        make().local("gs://bucket/0.tar")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage_options": {"s4": {}}}, "Did you mean 's3'"),
        ({"cache_gib": 0}, "cache_gib must be above 0"),
        ({"attempts": 0}, "attempts at least 1"),
    ],
)
def test_wrong_options_are_refused(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        make(**options)


def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    assert Sources().root == tmp_path / "shards"
    assert cache.GIB == 2**30
