"""Remote shards: the same pairs as local ones, faults named, a cache that keeps its bound."""

from __future__ import annotations

import http.server
import multiprocessing
import os
import re
import shutil
import threading
import time
import traceback
import warnings
from pathlib import Path

import pytest
from filelock import FileLock

from fasterase.errors import InputError, MissingExtraError
from fasterase.pairs import remote
from fasterase.pairs.open import open_pairs
from fasterase.pairs.remote import RemoteError, ShardCache, describe_shard
from fasterase.pairs.skips import BrokenPair
from fasterase.pairs.split import split
from tests.pairs.reading import contents, encoded


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, with ranges, and with the faults that are asked for."""

    daemon_threads = True
    ranges = True  # are known
    versions = True  # ETags are told
    password = ""  # what may read, in base64; empty for everyone
    cuts = 10**9  # how many more requests are cut

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}"
        self.reads = []  # (file name, first byte) of each request for content
        self.slow = {}  # seconds that each such request takes, by file name
        self.cut = {}  # bytes that are sent of each chunk, by file name, before the connection ends


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        name, data, start = self.answer() or ("", b"", 0)
        if not name:
            return
        server = self.server
        server.reads.append((name, start))
        time.sleep(server.slow.get(name, 0))
        if name in server.cut and server.cuts > 0:
            server.cuts -= 1
            self.close_connection = True
            data = data[: server.cut[name]]
        self.wfile.write(data)

    def answer(self):
        """Send the headers; return what is to follow."""
        server, name = self.server, self.path.strip("/").partition("?")[0]
        path, start = Path(server.folder, name), 0
        if not path.is_file() or server.password not in self.headers.get("Authorization", ""):
            return self.send_error(403 if path.is_file() else 404)
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and server.ranges:
            start = int(asked[1])
            data = data[start : int(asked[2]) + 1]
        self.send_response(206 if asked and server.ranges else 200)
        self.send_header("Content-Length", str(len(data)))
        if server.versions:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        return name, data, start

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    with Server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def shards(shards):
    """The paths of s-0.tar ... s-3.tar."""
    return sorted(map(str, shards.glob("*.tar")))


@pytest.fixture
def held(tmp_path):
    """Lists the copies of shards in the cache, or those of one."""
    return lambda name="": sorted((tmp_path / "cache/fasterase/remote").glob(f"*-*{name}"))


def drop(copies):
    for copy in copies:
        copy.unlink()


def test_the_same_pairs_as_local_ones_and_read_once(server, shards, held):
    pattern = f"{server.url}/s-{{0..3}}.tar"
    assert contents(pattern) == contents(shards)
    assert sorted(server.reads) == [(f"s-{n}.tar", 0) for n in range(4)]
    server.reads.clear()
    again = open_pairs(pattern, name="retain")
    assert again.digest() == open_pairs(shards, name="retain").digest()
    assert again[7].text == "n 7"
    assert server.reads == []
    # Nor are they read to open them when their copies are gone.
    drop(held())
    assert open_pairs(pattern, name="retain").texts(3) == ["n 3"]
    assert server.reads == []


def test_a_changed_shard_is_read_anew(server, shards, make_tar, held):
    url = f"{server.url}/s-0.tar"
    before = open_pairs(url, name="x")
    assert before[0].text == "n 0"
    make_tar("s-0.tar", {"new.png": encoded(9), "new.txt": "another"})
    assert [id for id, *_ in contents(url)] == ["s-0.tar/new"]
    assert before[0].text == "n 0"  # its copy is still there
    drop(held())
    with pytest.raises(BrokenPair, match="has changed since it was opened"):
        before[0]


def test_missing_shards_are_counted_and_one_is_named(server, shards):
    with pytest.raises(
        InputError, match=r"`retain`: 2 of 6 shards are missing.*s-4.tar is missing.*pattern"
    ):
        open_pairs(f"{server.url}/s-{{0..5}}.tar", name="retain")


@pytest.mark.parametrize(
    ("fault", "value", "message"),
    [
        ("slow", 0.6, "too slow: no answer within 0.2 seconds"),
        ("cut", 100, "[Nn]ot enough data|truncated|payload"),
    ],
)
def test_a_slow_or_truncated_shard_is_named_and_tried_again(
    server, shards, monkeypatch, fault, value, message
):
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 0.2 if fault == "slow" else 60.0)
    getattr(server, fault)["s-1.tar"] = value
    url = f"{server.url}/s-1.tar"
    with pytest.raises(InputError, match=rf"`x`: shard {url} cannot be read: .*3 tries") as caught:
        open_pairs(url, name="x")
    assert re.search(message, str(caught.value))
    assert len(server.reads) == remote.TRIES
    time.sleep(server.slow.get("s-1.tar", 0))


def test_a_cut_download_goes_on_where_it_stopped(server, shards, monkeypatch):
    """Also one of a process that was killed."""
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    server.cut["s-1.tar"], server.cuts = 100, 2
    assert contents(f"{server.url}/s-1.tar") == contents(shards[1])
    starts = [start for _, start in server.reads]
    assert starts[:4] == [0, 0, 0, 1000]
    cache = ShardCache.of_environment()
    shard = describe_shard(f"{server.url}/s-2.tar")
    path = cache._path(shard)
    data = Path(shards[2]).read_bytes()
    path.with_name(f"{path.name}.{shard.size}.partial").write_bytes(data[:5000])
    server.reads.clear()
    with cache.open(shard) as file:
        assert file.read() == data
    assert server.reads[0] == ("s-2.tar", 5000)


def test_a_shard_replaced_while_it_is_fetched_is_not_kept(server, shards, monkeypatch, held):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    request = remote._request

    def replacing(url, method, *arguments, **options):
        answer = request(url, method, *arguments, **options)
        if options.get("start") == 2000:  # by one of the same size
            os.replace(shutil.copy(shards[2], f"{shards[1]}.new"), shards[1])
        return answer

    monkeypatch.setattr(remote, "_request", replacing)
    assert os.path.getsize(shards[1]) == os.path.getsize(shards[2])
    with pytest.raises(InputError, match=r"s-1.tar has changed since it was opened"):
        open_pairs(f"{server.url}/s-1.tar", name="x")
    monkeypatch.setattr(remote, "_request", request)
    assert held() == []
    assert [caption for _, (caption,), *_ in contents(f"{server.url}/s-1.tar")] == ["n 4", "n 5"]


def test_a_copy_that_was_cut_off_is_fetched_again(server, shards, held):
    url = f"{server.url}/s-1.tar"
    whole = contents(url)
    os.truncate(*held(), 1000)
    assert contents(url) == whole


SIGNED = "X-Amz-Credential=key&X-Amz-Signature={}&versionId={}"


def test_a_url_signed_anew_finds_the_same_copy_and_index(server, shards, held):
    for signature in ("one", "two"):
        url = f"{server.url}/s-1.tar?{SIGNED.format(signature, 1)}"
        assert len(contents(url)) == 2
        assert len(server.reads) == 1
    assert "one" not in str(held())
    with_password = url.replace("://", "://me:secret@")
    assert remote.identity(url) == remote.identity(with_password)
    assert remote.identity(url) != remote.identity(url.replace("versionId=1", "versionId=2"))
    azure = "https://h/a.tar?se=2030&sig=x%2F&id=3"
    assert remote.identity(azure) == "https://h/a.tar?id=3"
    assert remote.identity("https://h/a.tar?se=2030") == "https://h/a.tar?se=2030"


@pytest.mark.filterwarnings("ignore:.*kept in memory")
def test_passwords_and_signatures_are_shown_nowhere(server, shards, caplog, monkeypatch):
    place = server.url.replace("://", "://me:SECRET@")
    server.password = "bWU6U0VDUkVU"
    os.truncate(shards[1], os.path.getsize(shards[1]) // 3)
    with pytest.warns(
        UserWarning, match=r"shard http://\*\*\*@.*s-1.tar\?\*\*\* is damaged"
    ) as warned:
        pairs = open_pairs(f"{place}/s-1.tar?{SIGNED.format('SECRET', 1)}", name="x")
    assert len(pairs) == 2
    shown = [repr(pairs), *(str(each.message) for each in warned)]
    server.password = "another"
    caplog.set_level("DEBUG", logger="fasterase")
    for url in (
        f"{place}/s-2.tar?X-Amz-Signature=SECRET",
        f"{place}/none.tar?X-Amz-Signature=SECRET",
        f"pipe:false {place}/s-2.tar?sig=SECRET",
    ):
        with pytest.raises(InputError, match="`x`") as caught:
            open_pairs(url, name="x")
        shown.append("".join(traceback.format_exception(caught.value)))
    assert "s-2.tar?***" in shown[-1]
    spooled = f"pipe:cat {shards[2]} # http://me:SECRET@h/s-2.tar?sig=SECRET"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown.append(f"{open_pairs(spooled, name='x')} {contents(spooled)}")
    assert "trying again" in caplog.text
    assert not [text for text in [*shown, caplog.text] if "SECRET" in text]


def test_a_server_without_ranges_and_versions(server, shards, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    server.ranges = server.versions = False
    told = r"`retain`: the server of 1 shards, .*s-1.tar, tells neither"
    with pytest.warns(UserWarning, match=told):
        assert contents(f"{server.url}/s-1.tar") == contents(shards[1])
    assert len(server.reads) == 1


def test_compressed_shards(server, make_tar):
    make_tar("z.tar.gz", {"a.png": encoded(1), "a.txt": "cat"}, "w:gz")
    with pytest.warns(UserWarning, match="compressed shards .* kept in memory"):
        pairs = open_pairs(f"{server.url}/z.tar.gz?signature=1", name="x")
    assert (pairs.id(0), pairs[0].text) == ("z.tar.gz/a", "cat")


def test_a_shard_lost_during_a_run_breaks_its_pairs_and_is_not_waited_for_again(
    server, shards, monkeypatch, held
):
    pairs = open_pairs(f"{server.url}/s-{{0..1}}.tar", name="x")
    drop([*held("s-1.tar"), Path(shards[1])])
    for row in (2, 3, 2):
        with pytest.raises(BrokenPair, match=r"s-1.tar is missing"):
            pairs[row]
        monkeypatch.setattr(remote, "describe_shard", lambda url: pytest.fail("asked again"))
    assert pairs[1].text == "n 1"


@pytest.fixture
def bound(shards, monkeypatch):
    """Bytes that the cache may hold: two shards and a bit."""
    bytes_of_two = sum(map(os.path.getsize, shards[:2])) + 1000
    monkeypatch.setenv(remote.BYTES_VARIABLE, str(bytes_of_two))
    return bytes_of_two


@pytest.mark.filterwarnings("ignore:.*Training shuffles")
def test_the_cache_keeps_its_bound_and_drops_the_least_recently_used(server, shards, bound, held):
    pairs = open_pairs(f"{server.url}/s-{{0..3}}.tar", name="x")
    (pairs.images.shards[0].cache.folder / "somebody-else's.partial").touch()
    for row in (0, 2, 0, 4, 0):
        assert pairs[row].text == f"n {row}"
        time.sleep(0.01)
        assert sum(path.stat().st_size for path in held()) <= bound
    assert len(held("s-0.tar")) == 1
    server.reads.clear()
    assert pairs[1].text == "n 1"
    assert server.reads == []
    # One that is being read can be read to its end, whatever the others need.
    with pairs.images.shards[0].open() as file:
        for row in (2, 4, 6):
            assert pairs[row].text == f"n {row}"
        assert file.read() == Path(shards[0]).read_bytes()


def read_at_random(pairs, seed, results):
    order = [(seed * 3 + 5 * n) % 8 for n in range(24)]
    folder, most = pairs.images.shards[0].cache.folder, 0
    for row in order:
        assert pairs[row].text == f"n {row}"
        # Nothing is dropped in the meantime: files seen before and after would not add up.
        with FileLock(folder / "locks" / "room"):
            most = max(most, sum(path.stat().st_size for path in folder.glob("*-*.tar")))
    results.put(most)


@pytest.mark.filterwarnings("ignore:.*Training shuffles")
def test_several_processes_share_the_cache(server, shards, bound, held):
    # As workers of a loader: forked by a process that has used the network.
    pairs = open_pairs(f"{server.url}/s-{{0..3}}.tar", name="x")
    drop(held())
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    started = [
        context.Process(target=read_at_random, args=(pairs, seed, results)) for seed in range(3)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert all(0 < results.get() <= bound for _ in started)


def test_training_reads_few_shards_at_a_time(server, shards, monkeypatch):
    url = f"{server.url}/s-{{0..3}}.tar"
    local, pairs = open_pairs(shards, name="x"), open_pairs(url, name="x")
    assert local.shards() is None
    assert pairs.shards().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    _, retain = split(pairs, forget=r"n [05]")
    assert retain.shards().tolist() == [0, 1, 1, 2, 3, 3]
    monkeypatch.setenv(remote.BYTES_VARIABLE, str(os.path.getsize(shards[0]) * 3))
    with pytest.warns(UserWarning, match=r"`x`: .* Raise FASTERASE_SHARD_CACHE_BYTES to \d+"):
        open_pairs(url, name="x")


def test_wrong_settings_are_named(server, shards, monkeypatch):
    url = f"{server.url}/s-0.tar"
    monkeypatch.setenv(remote.BYTES_VARIABLE, "64 GB")
    with pytest.raises(InputError, match="FASTERASE_SHARD_CACHE_BYTES='64 GB' must be a whole"):
        open_pairs(url, name="x")
    monkeypatch.setenv(remote.BYTES_VARIABLE, "1000")
    with pytest.raises(InputError, match=f"shard {url} takes .* Raise FASTERASE_SHARD_CACHE_BYTES"):
        open_pairs(url, name="x")
    with pytest.raises(MissingExtraError, match=r"s3:// shards needs `s3fs`.*fasterase\[s3\]"):
        open_pairs("s3://bucket/{0..3}.tar", name="x")
    monkeypatch.setenv(remote.BYTES_VARIABLE, "")
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1"):
        describe_shard("http://127.0.0.1:9/s.tar")
