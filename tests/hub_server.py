"""A Hugging Face Hub on 127.0.0.1, small and in memory, for tests that publish and load with the real clients.

    def test_weights_are_published(hub, monkeypatch):
        monkeypatch.setenv('HF_TOKEN', WRITE_TOKEN)
        HfApi().upload_folder(repo_id='acme/model', folder_path='run')
        assert 'model.safetensors' in hub.repos['acme/model'].commits[-1]

Clients read HF_ENDPOINT and HF_HOME when they are imported. So conftest.py sets both first of all, and every test and
every process that a test starts talks to this Hub.
What they ask for was found by logging huggingface_hub 2.4, timm 1.0.31 and datasets 5.2. How this differs from the Hub:

* Uploads go by LFS, in one part. There is no Xet, and clients are told not to use it: no answer of a server would do.
* `main` is the only branch. There are no tags and no pull requests.
* A Space is a repository with an sdk; nothing runs in it.
* Large files come from the server itself, without a redirect, and the metadata in a README.md is not checked.
"""
import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import struct
import threading
from collections.abc import Callable, MutableMapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

WRITE_TOKEN, READ_TOKEN = 'hf_write', 'hf_read'
ROLES = {WRITE_TOKEN: 'write', READ_TOKEN: 'read'}
USER, ORG = 'ann', 'acme'  # both tokens are of this user, who is a member of this organization

DATE = '2026-01-01T00:00:00.000Z'  # of every repository and commit
LFS_SUFFIXES = ('.bin', '.ckpt', '.onnx', '.parquet', '.pt', '.pth', '.safetensors', '.tar', '.zip')


class Refusal(Exception):
    """An answer that says no: clients choose their exception class by `code` and show `message`."""

    def __init__(self, status: int, message: str, code: str = '', commit: str = '', **details):
        self.status = status
        header_safe = message.encode('ascii', 'replace').decode()
        self.headers = {'X-Error-Message': header_safe, 'X-Error-Code': code, 'X-Repo-Commit': commit}
        self.content = {'error': message, **details}


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and path.endswith(LFS_SUFFIXES)  # clients never send an empty file by LFS


def file_info(path: str, data: bytes) -> dict:
    """Has each field under all the names that the Hub's answers use for it."""
    if is_lfs(path, len(data)):
        oid = hashlib.sha256(data).hexdigest()
        lfs = {'oid': oid, 'sha256': oid, 'size': len(data), 'pointerSize': 134}
    else:
        oid = hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()  # as git does
        lfs = None
    return {
        'type': 'file', 'path': path, 'rfilename': path, 'size': len(data), 'oid': oid, 'blobId': oid, 'lfs': lfs,
    }


class Commit(dict):
    """All files of a repository, path -> bytes, as one commit left them."""

    def __init__(self, files: dict[str, bytes], title: str):
        super().__init__(files)
        self.id = secrets.token_hex(20)
        self.title = title

    def tree(self, folder: str = '', recursive: bool = True) -> dict[str, dict]:
        """path -> description, of the files and folders below `folder`"""
        prefix = f'{folder}/' if folder else ''
        entries = {}
        for path in sorted(path for path in self if path.startswith(prefix)):
            parts = path.removeprefix(prefix).split('/')
            for depth in range(1, len(parts) + 1 if recursive else 2):
                entry = prefix + '/'.join(parts[:depth])
                folder_info = {'type': 'directory', 'path': entry, 'size': 0, 'oid': '0' * 40}
                entries[entry] = file_info(path, self[path]) if depth == len(parts) else folder_info
        return entries


class Repo:
    def __init__(self, private: bool = False, sdk: str | None = None):
        self.private = private
        self.sdk = sdk  # of a Space
        self.gated = False
        self.commits = [Commit({'.gitattributes': b''}, 'initial commit')]  # oldest first

    def at(self, revision: str) -> Commit:
        for commit in reversed(self.commits):
            if revision in ('main', commit.id):
                return commit
        raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')


KEY = '((?:datasets/|spaces/)?[^/]+/[^/]+)'  # of HubServer.repos
KINDS = {'dataset': 'datasets/', 'space': 'spaces/'}
API = f'/api/(?:models/)?{KEY}'
ROUTES: dict[str, Callable] = {}


def route(*patterns: str) -> Callable:
    """The method answers requests that match a pattern; its arguments are the groups."""
    def register(method: Callable) -> Callable:
        ROUTES.update(dict.fromkeys(patterns, method))
        return method
    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # headers and body are two writes, and the second would wait for an ACK

    def answer(self):
        url = urlsplit(self.path)
        self.hub: HubServer = self.server
        self.hub.log.append((self.command, url.path))
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        try:
            self.role = self.authenticate()
            self.fail_if_told_to(f'{self.command} {url.path}')
            for pattern, method in ROUTES.items():
                if match := re.fullmatch(pattern, f'{self.command} {url.path}'):
                    return method(self, *(unquote(group) for group in match.groups()))
            raise Refusal(404, f'this test server does not know {self.command} {url.path}')
        except ConnectionResetError:
            pass
        except Refusal as refusal:
            self.send(refusal.status, json.dumps(refusal.content).encode(), refusal.headers)

    do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = answer

    def fail_if_told_to(self, request: str):
        for fault in self.hub.faults:
            if fault['times'] and re.fullmatch(fault['pattern'], request):
                fault['times'] -= 1
                if fault['status'] is None:
                    self.reset()
                    raise ConnectionResetError
                raise Refusal(fault['status'], fault['message'])

    def send_json(self, content: dict | list):
        self.send(200, json.dumps(content).encode(), {'Content-Type': 'application/json'})

    def send(self, status: int, body: bytes, headers: dict[str, str], reset_after: int | None = None):
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[:reset_after])
        if reset_after is not None:
            self.reset()

    def reset(self):
        # lingering for 0 seconds makes close send a reset; socketserver would first end the stream in good order
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, *args):
        """Nothing on stderr: `hub.log` has the requests."""

    def authenticate(self) -> str | None:
        """The role of the caller's token; None for an anonymous caller"""
        authorization = self.headers.get('Authorization')
        if authorization is None:
            return None
        token = authorization.removeprefix('Bearer ')
        if token not in ROLES:
            raise Refusal(401, 'Invalid credentials in Authorization header')
        return ROLES[token]

    def require_write(self, key: str):
        namespace = key.split('/')[-2]
        if self.role is None:
            raise Refusal(401, 'Invalid username or password.')
        if self.role != 'write':
            raise Refusal(403, f'Your token may only read; writing to "{namespace}" takes a token with the role write')
        if namespace not in (USER, ORG):
            raise Refusal(403, f'You do not have the rights to write to the namespace "{namespace}"')

    def find_repo(self, key: str, to_write: bool = False) -> Repo:
        repo = self.hub.repos.get(key)
        # strangers are not told that a private repository exists
        if repo is None or repo.private and not (self.role and key.split('/')[-2] in (USER, ORG)):
            raise Refusal(404 if self.role else 401, 'Repository not found', 'RepoNotFound')
        if to_write:
            self.require_write(key)
        return repo

    @route('GET /api/whoami-v2')
    def whoami(self):
        if self.role is None:
            raise Refusal(401, 'Invalid username or password.')
        orgs = [{'type': 'org', 'name': ORG, 'roleInOrg': 'write'}]
        auth = {'type': 'access_token', 'accessToken': {'displayName': self.role, 'role': self.role}}
        self.send_json({'type': 'user', 'name': USER, 'orgs': orgs, 'auth': auth})

    # Publishing, in the order in which a client calls

    @route('POST /api/repos/create')
    def create_repo(self):
        request = json.loads(self.body)
        kind, sdk = request.get('type'), request.get('sdk')
        if (kind == 'space') != (sdk in ('gradio', 'docker', 'static')):
            raise Refusal(400, f'a Space, and nothing else, has an sdk: got a {kind or "model"} with {sdk}')
        key = f'{KINDS.get(kind, "")}{request.get("organization") or USER}/{request["name"]}'
        self.require_write(key)
        url = f'{self.hub.endpoint}/{key}'
        with self.hub.lock:
            if key in self.hub.repos:
                raise Refusal(409, 'You already created this repo', url=url)
            # huggingface_hub 1 sends `private`, 2 sends `visibility`
            self.hub.repos[key] = Repo(request.get('private') or request.get('visibility') == 'private', sdk)
        self.send_json({'url': url})

    @route('DELETE /api/repos/delete')
    def delete_repo(self):
        request = json.loads(self.body)
        key = f'{KINDS.get(request.get("type"), "")}{request.get("organization") or USER}/{request["name"]}'
        self.find_repo(key, to_write=True)
        del self.hub.repos[key]
        self.send_json({})

    @route('POST /api/validate-yaml')
    def validate_yaml(self):
        self.send_json({'errors': [], 'warnings': []})

    @route(f'POST {API}/preupload/([^/]+)')
    def preupload(self, key: str, revision: str):
        commit = self.find_repo(key, to_write=True).at(revision)
        files = json.loads(self.body)['files']
        for file in files:
            path = file['path']
            file['uploadMode'] = 'lfs' if is_lfs(path, file['size']) else 'regular'
            file['shouldIgnore'] = False
            file['oid'] = file_info(path, commit[path])['oid'] if path in commit else None  # same: nothing to commit
        self.send_json({'files': files})

    @route(rf'POST /{KEY}\.git/info/lfs/objects/batch')
    def lfs_batch(self, key: str):
        self.find_repo(key, to_write=True)
        objects = json.loads(self.body)['objects']
        for item in objects:
            if item['oid'] not in self.hub.blobs:
                upload = {'href': f'{self.hub.endpoint}/lfs/{item["oid"]}'}
                item['actions'] = {'upload': upload, 'verify': {'href': f'{self.hub.endpoint}/lfs/verify'}}
        self.send_json({'transfer': 'basic', 'objects': objects})

    @route('PUT /lfs/([0-9a-f]{64})')
    def lfs_upload(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, f'the uploaded content is not {oid}')
        self.hub.blobs[oid] = self.body
        self.send_json({})

    @route('POST /lfs/verify')
    def lfs_verify(self):
        if json.loads(self.body)['oid'] not in self.hub.blobs:
            raise Refusal(404, 'this file was not uploaded')
        self.send_json({})

    @route(f'POST {API}/commit/([^/]+)')
    def commit(self, key: str, revision: str):
        repo = self.find_repo(key, to_write=True)
        if revision != 'main' or 'create_pr' in self.query:
            raise Refusal(403, 'this test server takes commits to main only')
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        with self.hub.lock:
            head = repo.at('main')
            if header['value'].get('parentCommit', head.id) != head.id:
                raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
            commit = Commit(head, header['value']['summary'])
            for operation in operations:
                self.apply(operation['key'], operation['value'], commit)
            repo.commits.append(commit)
        self.send_json({'commitOid': commit.id, 'commitUrl': f'{self.hub.endpoint}/{key}/commit/{commit.id}'})

    def apply(self, operation: str, value: dict, commit: Commit):
        path = value['path']
        if operation == 'file':
            commit[path] = base64.b64decode(value['content'])
        elif operation == 'lfsFile' and value['oid'] in self.hub.blobs:
            commit[path] = self.hub.blobs[value['oid']]
        elif operation == 'deletedFile' and path in commit:
            del commit[path]
        else:
            raise Refusal(400, f'cannot do {operation} of {path}')

    # Loading

    @route(f'GET {API}', f'GET {API}/revision/([^/]+)')
    def info(self, key: str, revision: str = 'main'):
        repo = self.find_repo(key)
        commit = repo.at(revision)
        sizes = 'blobs' in self.query
        self.send_json({
            'id': '/'.join(key.split('/')[-2:]),
            'sha': commit.id,
            'private': repo.private,
            'gated': 'manual' if repo.gated else False,
            'siblings': [file_info(*item) if sizes else {'rfilename': item[0]} for item in sorted(commit.items())],
            'tags': [],
            'sdk': repo.sdk,
            'createdAt': DATE,
            'lastModified': DATE,
        })

    @route(f'GET {API}/tree/([^/]+)/?(.*)')
    def tree(self, key: str, revision: str, folder: str):
        commit = self.find_repo(key).at(revision)
        entries = commit.tree(folder, self.query.get('recursive', [''])[0].lower() in ('true', '1'))
        if folder and not entries:
            raise Refusal(404, f'{folder} does not exist on {revision}', 'EntryNotFound', commit.id)
        self.send_json(list(entries.values()))

    @route(f'POST {API}/paths-info/([^/]+)')
    def paths_info(self, key: str, revision: str):
        entries = self.find_repo(key).at(revision).tree()
        self.send_json([entries[path] for path in parse_qs(self.body.decode())['paths'] if path in entries])

    @route(f'GET {API}/refs')
    def refs(self, key: str):
        main = {'name': 'main', 'ref': 'refs/heads/main', 'targetCommit': self.find_repo(key).at('main').id}
        self.send_json({'branches': [main], 'tags': [], 'converts': [], 'pullRequests': []})

    @route(f'GET {API}/commits/([^/]+)')
    def commits(self, key: str, revision: str):
        repo = self.find_repo(key)
        until = repo.commits.index(repo.at(revision)) + 1
        self.send_json([
            {'id': commit.id, 'title': commit.title, 'message': '', 'authors': [{'user': USER}], 'date': DATE}
            for commit in reversed(repo.commits[:until])
        ])

    @route(
        f'(?:HEAD|GET) /{KEY}/resolve/([^/]+)/(.+)',
        '(?:HEAD|GET) /([^/]+)/resolve/([^/]+)/(.+)',  # a name without namespace: no repository here has one
    )
    def resolve(self, key: str, revision: str, path: str):
        repo = self.find_repo(key)
        commit = repo.at(revision)
        if repo.gated:
            raise Refusal(403, f'Access to {key} is restricted and you are not in the authorized list', 'GatedRepo')
        if path not in commit:
            raise Refusal(404, f'{path} does not exist on {revision}', 'EntryNotFound', commit.id)
        data = commit[path]
        headers = {'X-Repo-Commit': commit.id, 'ETag': f'"{file_info(path, data)["oid"]}"', 'Accept-Ranges': 'bytes'}
        drop = next((suffix for suffix in self.hub.drops if path.endswith(suffix)), None)
        if self.command == 'GET' and drop is not None:
            self.send(200, data, headers, reset_after=self.hub.drops.pop(drop))
        elif wanted := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
            if start >= stop:
                raise Refusal(416, f'{path} has {len(data)} bytes')
            self.send(206, data[start:stop], {**headers, 'Content-Range': f'bytes {start}-{stop - 1}/{len(data)}'})
        else:
            self.send(200, data, headers)


class HubServer(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.endpoint = f'http://127.0.0.1:{self.server_port}'
        self.lock = threading.Lock()  # one repository or commit is made at a time
        self.clear()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()  # seconds to notice shutdown
        return self

    def __exit__(self, *args):
        self.shutdown()
        super().__exit__(*args)

    def clear(self):
        self.repos: dict[str, Repo] = {}  # 'acme/model', 'datasets/acme/dataset', 'spaces/acme/page'
        self.blobs: dict[str, bytes] = {}  # sha256 -> content, of what came by LFS
        self.drops: dict[str, int] = {}  # path suffix -> bytes to send before the reset
        self.faults: list[dict] = []  # see fail
        self.log: list[tuple[str, str]] = []  # (method, path) of every request

    def gate(self, key: str):
        """Nobody may download from this repository any more; its metadata stays visible."""
        self.repos[key].gated = True

    def fail(self, pattern: str, status: int | None, message: str = '', times: int = 100):
        """Refuse so many requests 'METHOD path' that match the pattern with the status; None resets the connection."""
        self.faults.append(dict(pattern=pattern, status=status, message=message, times=times))

    def drop_next_download(self, path_suffix: str, after_bytes: int):
        """The next GET of such a file ends with a connection reset after so many bytes."""
        self.drops[path_suffix] = after_bytes


def redirect_clients(environment: MutableMapping[str, str], endpoint: str, home: str):
    """Let clients with this environment talk to the Hub at `endpoint`, without a token, with their files in `home`."""
    # caches, tokens and offline mode, as set for everyday work, would win over HF_HOME
    for name in list(environment):
        if name.startswith(('HF_', 'HUGGING', 'TRANSFORMERS_')):
            del environment[name]
    environment.update(HF_ENDPOINT=endpoint, HF_HOME=home, NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
    environment.update({f'HF_HUB_DISABLE_{what}': '1' for what in ('XET', 'TELEMETRY', 'PROGRESS_BARS')})


def empty_caches():
    """Let clients forget what they have loaded."""
    for path in Path(os.environ['HF_HOME']).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
