import os
import urllib.request
from urllib.error import HTTPError

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError


@pytest.fixture
def server(monkeypatch):
    # The client would upload through its Xet extension; it reads this constant again at each upload.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        yield server


@pytest.fixture
def api(server):
    api = HfApi(endpoint=server.url, token=server.token)
    assert api.create_repo("tiny").repo_id == "user/tiny"  # in the namespace of the token's owner
    return api


def test_a_folder_comes_back_byte_for_byte(server, api, tmp_path):
    files = {"README.md": b"---\nlicense: mit\n---\n# Tiny\n", "sub/model.safetensors": os.urandom(2**20)}
    for path, content in files.items():
        (tmp_path / "local" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / path).write_bytes(content)
    for _ in range(2):  # the second upload finds nothing to commit
        api.upload_folder(repo_id="user/tiny", folder_path=tmp_path / "local", commit_message="first")
    assert server.repos == {"user/tiny": files}
    assert server.commits == [("user/tiny", "first")]
    assert api.list_repo_files("user/tiny") == sorted(files)
    for path, content in files.items():
        with open(api.hf_hub_download("user/tiny", path, cache_dir=tmp_path / "cache"), "rb") as file:
            assert file.read() == content


def test_a_commit_overwrites_and_deletes_and_leaves_earlier_ones(server, api, tmp_path):
    server.repos["user/tiny"] = {"a.txt": b"old", "b.txt": b"b"}
    old = api.model_info("user/tiny").sha
    api.upload_file(repo_id="user/tiny", path_in_repo="a.txt", path_or_fileobj=b"new")
    api.delete_file("b.txt", "user/tiny")
    assert server.repos["user/tiny"] == {"a.txt": b"new"}
    with open(api.hf_hub_download("user/tiny", "a.txt", revision=old, cache_dir=tmp_path), "rb") as file:
        assert file.read() == b"old"


def test_refusals(server, api, tmp_path):
    upload = {"repo_id": "user/tiny", "path_in_repo": "a.txt", "path_or_fileobj": b"a"}
    with pytest.raises(HfHubHTTPError, match="401"):
        api.upload_file(**upload, token="hf_wrong")
    server.refuse = 403
    with pytest.raises(HfHubHTTPError, match="403"):
        api.upload_file(**upload)
    server.refuse = None
    with pytest.raises(HTTPError, match="400"):  # not what the address promises
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/lfs/{'0' * 64}/1", b"a", method="PUT"))
    assert server.repos == {"user/tiny": {}}
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("user/tiny", "a.txt", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("gpt2", "config.json", cache_dir=tmp_path)
