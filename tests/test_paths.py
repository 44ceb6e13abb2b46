"""Places, and files that appear whole; what object storage adds is in store/test_object_store*."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glmae_ray.errors import UserError
from glmae_ray.paths import (
    folders_with,
    is_url,
    names_in,
    publish,
    read_file,
    remove_folder,
    stamps,
    to_place,
)
from glmae_ray.s3 import server


def test_a_url_keeps_its_name_and_a_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert to_place("a/b") == tmp_path / "a" / "b"
    assert str(to_place("s3://bucket/a b/c/") / "d") == "s3://bucket/a b/c/d"
    assert to_place(to_place("s3://bucket/a")) == to_place("s3://bucket/a")
    assert [is_url(place) for place in ("a", tmp_path, "s3://b", to_place("s3://b/c"))] == [
        False, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("url", ["nothing://a/b", "s3a3://a"])
def test_a_url_of_an_unknown_kind_is_refused_in_one_line(url):
    with pytest.raises(UserError, match=r"give a path or s3://BUCKET/FOLDER") as caught:
        to_place(url)
    assert caught.value.lines[0].startswith(f"{url}: ")
    assert len(caught.value.lines) == 1


def test_the_endpoint_of_s3_alone_wins_and_must_be_a_url(monkeypatch):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one:9000")
    assert server() == ("http://one:9000", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://two")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert server() == ("https://two", "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "two:9000")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL: two:9000 does not start with http"):
        to_place("s3://bucket/a")


@pytest.mark.parametrize("url", ["s3://a:hunter2@bucket/b", "ftp://me:hunter2@host/@a/b"])
def test_a_password_in_a_url_is_refused_and_not_shown(url):
    with pytest.raises(UserError, match="has a password in its URL") as caught:
        to_place(url)
    assert "hunter2" not in str(caught.value)
    assert to_place("s3://bucket/10:30@home").name == "10:30@home"


@pytest.mark.parametrize("endpoint", ["http://me:hunter2@host:9000", "me:hunter2@host:9000"])
def test_credentials_in_the_endpoint_of_s3_are_refused_and_not_shown(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL: has a name or password") as caught:
        to_place("s3://bucket/a")
    assert "hunter2" not in str(caught.value)


def test_a_published_file_is_whole_at_every_moment(tmp_path, monkeypatch):
    place = tmp_path / "new" / "folder" / "index.json"
    publish(place, "old")
    steps = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(number):
        steps.append(("content", os.fstat(number).st_size))
        real_sync(number)

    def replace(source, target):
        steps.append(("name", target.name))
        assert target.read_text() == "old"
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    publish(place, b"newer")
    # The content is on the disk before the name: the other way round, a power cut could leave
    # the name with nothing behind it.
    assert steps == [("content", 5), ("name", "index.json")]
    assert read_file(place) == b"newer"
    assert names_in(place.parent) == {"index.json"}


def test_a_killed_publish_leaves_the_old_file_and_does_not_hinder_the_next(tmp_path, monkeypatch):
    place = tmp_path / "facts.json"
    publish(place, "old")

    def killed(number):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(place, "new, and long")
    assert read_file(place) == b"old"
    publish(place, "newer")
    assert read_file(place) == b"newer"


def test_only_what_is_not_there_reads_as_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    assert read_file(tmp_path / "none" / "a") is None
    assert read_file(tmp_path / "file" / "a") is None
    with pytest.raises(OSError, match="Is a directory"):
        read_file(tmp_path)


def test_folders_are_found_by_the_file_they_hold_and_removed_with_it_first(tmp_path, monkeypatch):
    for name in ("b", "a", "half"):
        publish(tmp_path / name / "more" / "data", name)
    publish(tmp_path / "b" / "done", "")
    publish(tmp_path / "a" / "done", "")
    publish(tmp_path / "half" / "more" / "done", "")
    assert folders_with(tmp_path, "done") == ["a", "b"]
    assert folders_with(tmp_path / "none", "done") == []

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "a", first="done")
    assert folders_with(tmp_path, "done") == ["b"]
    assert remove_folder(tmp_path / "a", first="done")
    assert not remove_folder(tmp_path / "a", first="done")
    assert names_in(tmp_path) == {"b", "half"}


def test_a_stamp_changes_with_the_content_and_only_then(tmp_path):
    assert stamps(tmp_path / "none", "events") == {}
    publish(tmp_path / "events.jsonl", "1")
    publish(tmp_path / "events" / "a.jsonl", "1")
    publish(tmp_path / "metrics.jsonl", "1")
    before = stamps(tmp_path, "events")
    assert before.keys() == {"events.jsonl", "events/a.jsonl"}
    assert stamps(tmp_path, "events") == before
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write("2")
    publish(tmp_path / "events" / "a.jsonl", "2")
    after = stamps(tmp_path, "events")
    assert all(after[name] != before[name] for name in before)
