"""Files of lines: torn ones, full disks, many writers, and reading only what has changed."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import textwrap

import pytest

from glmae_ray import journal
from glmae_ray.journal import FileLines, LineFiles, by_time, read_lines
from glmae_ray.tracking import read_events, write_event
from glmae_ray.watch import Event


def quiet(kind: str, line: str) -> None:
    raise AssertionError(line)


@pytest.mark.parametrize("torn", [b'{"n": 1, "fa', b'{"n": 1', b"\0\0\0"])
def test_a_line_that_a_kill_cut_short_is_left_out_and_spoils_no_other(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 0}\n' + torn)
    assert read_lines(path) == [{"n": 0}]
    FileLines(path, quiet).append({"n": 2})
    FileLines(path, quiet).append({"n": 3})
    assert read_lines(path) == [{"n": 0}, {"n": 2}, {"n": 3}]


def test_what_a_full_disk_does_not_take_comes_later_from_where_it_stopped(tmp_path):
    # A limit on the size of files fails as a full disk does: after a part.
    script = """
        import resource, sys
        from pathlib import Path
        from glmae_ray.journal import FileLines, read_lines

        path = Path(sys.argv[1])
        told = []
        lines = FileLines(path, lambda kind, line: told.append(kind))
        lines.append({"n": 0})
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, most))
        for n in range(1, 5):
            lines.append({"n": n})
        assert path.stat().st_size == 20, path.stat()
        assert [r["n"] for r in read_lines(path)] == [0, 1]
        assert told == ["late_write"], told
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        lines.append({"n": 5})
        assert [r["n"] for r in read_lines(path)] == [0, 1, 2, 3, 4, 5]
        assert told == ["late_write", "written_again"], told
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "a.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def _write_events(run, rank):
    for number in range(200):
        write_event(run, Event("note", f"{rank} {number}", {"number": number}), rank=rank)


def test_workers_append_to_one_file_of_events_at_the_same_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_write_events, args=(tmp_path, rank)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    events = read_events(tmp_path)
    assert len(events) == 600
    assert len((tmp_path / "events.jsonl").read_bytes().splitlines()) == 600
    for rank in range(3):
        mine = [event for event in events if event["rank"] == rank]
        assert [event["number"] for event in mine] == list(range(200))
    times = [event["time"] for event in events]
    assert min(times) > 1.7e9


def test_records_of_several_writers_are_in_order_of_time_and_of_each_writer():
    early = [{"n": 1, "time": 10.0}, {"n": 2, "time": 9.0}, {"n": 3, "time": 30.0}]
    late = [{"n": 4, "time": 20.0}, {"n": 5, "time": 20.0}]
    assert [r["n"] for r in by_time([early, late])] == [1, 2, 4, 5, 3]
    assert by_time([[{"n": 1}, {"n": 2}]]) == [{"n": 1}, {"n": 2}]  # before events had a time


def test_files_are_read_again_only_where_they_have_changed(tmp_path, monkeypatch):
    (tmp_path / "events").mkdir()
    paths = [tmp_path / "events.jsonl", tmp_path / "events" / "a.jsonl"]
    for path in paths:
        path.write_text('{"n": 1}\n')
    (tmp_path / "events.png").write_bytes(b"of someone else")
    read = []

    def counted(place):
        read.append(place)
        return read_lines(place)

    monkeypatch.setattr(journal, "read_lines", counted)
    files = LineFiles(tmp_path, "events.jsonl")
    assert files.read() == {"events.jsonl": [{"n": 1}], "events/a.jsonl": [{"n": 1}]}
    files.read()
    assert sorted(read) == sorted(paths)
    FileLines(paths[1], quiet).append({"n": 2})
    assert files.read()["events/a.jsonl"] == [{"n": 1}, {"n": 2}]
    assert read[2:] == [paths[1]]
