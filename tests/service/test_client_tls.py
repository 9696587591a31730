"""Both clients and the commands by `wss://`: whom they trust, what they show, what they say.

TLS ends in a relay before a plain worker, as it does at a gateway.
"""

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gpu_service import __main__ as commands
from gpu_service import client_tls
from gpu_service.blocking import BlockingClient
from gpu_service.client import Client, UnreachableError, fetch_json
from gpu_service.client_tls import TlsFilesError
from tests.service.conftest import Worker
from tests.service.fakes import BOUND_S, x_of

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Authority:
    """Issues certificates, whose files lie in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.file = self._write(f"{name}-ca.pem", self._signed(self.name, self.key, is_ca=True))

    def issue(
        self,
        name: str,
        *,
        address: str = "127.0.0.1",
        purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
        until: datetime.datetime = NOW + DAY,
    ) -> tuple[Path, Path]:
        """Files of a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        usage = x509.ExtendedKeyUsage([purpose])
        made = self._signed(subject, key, alternative, usage, until=until)
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        key_file = self.folder / f"{name}.key"
        key_file.write_bytes(secret)
        return self._write(f"{name}.pem", made), key_file

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *extensions: x509.ExtensionType,
        is_ca: bool = False,
        until: datetime.datetime = NOW + DAY,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 2 * DAY)
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "trusted")


@pytest.fixture(scope="module")
def server_files(authority: Authority) -> tuple[Path, Path]:
    return authority.issue("server")


@contextlib.asynccontextmanager
async def relay(
    worker: Worker, files: tuple[Path, Path], *, clients: Path | None = None, port: int = 0
) -> AsyncIterator[int]:
    """The port of TLS before a worker; `clients` is whose certificates are asked for."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*files)
    if clients is not None:
        context.load_verify_locations(clients)
        context.verify_mode = ssl.CERT_REQUIRED
    writers = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside = await asyncio.open_connection("127.0.0.1", worker.port)
        await asyncio.gather(pump(reader, inside[1]), pump(inside[0], writer))

    server = await asyncio.start_server(passed_on, "127.0.0.1", port, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


async def ask(url: str, **options: Any) -> float:
    async with Client(url, deadline_s=BOUND_S, **options) as client:
        return float((await client.infer(x_of(3))).outputs["y"][0, 0])


async def ask_blocking(url: str, **options: Any) -> float:
    def asked() -> float:
        with BlockingClient(url, deadline_s=BOUND_S, **options) as client:
            return float(client.infer(x_of(3)).outputs["y"][0, 0])

    return await asyncio.to_thread(asked)


either = pytest.mark.parametrize("asked", [ask, ask_blocking])


@either
async def test_a_server_of_a_trusted_authority_is_asked(
    worker: Worker, authority: Authority, server_files: tuple[Path, Path], asked: Callable[..., Any]
) -> None:
    async with relay(worker, server_files) as port:
        tls = client_tls.context(ca=authority.file)
        assert await asked(f"wss://127.0.0.1:{port}", tls=tls) == 6
        metadata = await fetch_json(f"wss://127.0.0.1:{port}", "/v2", timeout_s=BOUND_S, tls=tls)
        assert metadata["models"][0]["name"] == "double"


@either
@pytest.mark.parametrize(
    "wrong, words",
    [
        ("untrusted", "nobody whom this client trusts has signed it; give the authority's"),
        ("expired", "it has expired; whoever runs the server has to renew it"),
        ("elsewhere", "it is for another name .*127.0.0.1.*; use the name"),
        ("a client's", "it is not meant for a server"),
    ],
)
async def test_a_certificate_that_is_refused_says_why(
    worker: Worker,
    authority: Authority,
    tmp_path: Path,
    asked: Callable[..., Any],
    wrong: str,
    words: str,
) -> None:
    files = {
        "untrusted": lambda: Authority(tmp_path, "other").issue("server"),
        "expired": lambda: authority.issue("expired", until=NOW - DAY),
        "elsewhere": lambda: authority.issue("elsewhere", address="192.0.2.1"),
        "a client's": lambda: authority.issue("c", purpose=ExtendedKeyUsageOID.CLIENT_AUTH),
    }[wrong]()
    async with relay(worker, files) as port:
        with pytest.raises(UnreachableError, match=f"its certificate is refused: {words}"):
            await asked(f"wss://127.0.0.1:{port}", tls=client_tls.context(ca=authority.file))
        with pytest.raises(UnreachableError, match=f"its certificate is refused: {words}"):
            tls = client_tls.context(ca=authority.file)
            await fetch_json(f"wss://127.0.0.1:{port}", "/v2", timeout_s=BOUND_S, tls=tls)


async def test_a_port_without_tls_is_told_from_a_certificate(worker: Worker) -> None:
    async def like_nginx(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    answering = await asyncio.start_server(like_nginx, "127.0.0.1", 0)
    async with answering:
        for port in (worker.port, answering.sockets[0].getsockname()[1]):
            with pytest.raises(UnreachableError, match="that port does not speak TLS; use ws://"):
                await ask(f"wss://127.0.0.1:{port}")


async def test_the_next_connection_is_by_the_same_tls(
    worker: Worker, authority: Authority, server_files: tuple[Path, Path]
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = relay(worker, server_files)
        port = await first.__aenter__()
        tls = client_tls.context(ca=authority.file)
        url = f"wss://127.0.0.1:{port}"
        client = await stack.enter_async_context(Client(url, deadline_s=BOUND_S, tls=tls))
        await client.infer(x_of(1))
        await first.__aexit__(None, None, None)
        await stack.enter_async_context(relay(worker, server_files, port=port))
        assert (await client.infer(x_of(4))).outputs["y"][0, 0] == 8
        assert client.reconnects >= 1


@either
async def test_a_certificate_is_shown_to_a_server_that_asks(
    worker: Worker, authority: Authority, server_files: tuple[Path, Path], asked: Callable[..., Any]
) -> None:
    certificate, key = authority.issue("me", purpose=ExtendedKeyUsageOID.CLIENT_AUTH)
    async with relay(worker, server_files, clients=authority.file) as port:
        url = f"wss://127.0.0.1:{port}"
        mine = client_tls.context(ca=authority.file, certificate=certificate, key=key)
        assert await asked(url, tls=mine) == 6
        with pytest.raises(UnreachableError):
            await asked(url, tls=client_tls.context(ca=authority.file))


def test_files_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("one")
    _, other = authority.issue("two")
    empty = tmp_path / "empty"
    empty.touch()
    locked = tmp_path / "locked.key"
    secret = serialization.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    for words, options in {
        "no-such cannot be read: No such file": {"ca": tmp_path / "no-such"},
        "empty holds no certificate in PEM": {"ca": empty},
        "two.key is not the key of .*one.pem": {"certificate": certificate, "key": other},
        "one.pem holds no certificate with its key": {"certificate": certificate},
        "one.key is the key of a certificate, and none": {"key": key},
        "locked.key is encrypted": {"certificate": certificate, "key": locked},
    }.items():
        with pytest.raises(TlsFilesError, match=words):
            client_tls.context(**options)


def test_tls_without_wss_is_refused() -> None:
    with pytest.raises(ValueError, match="no wss:// address"):
        Client("ws://localhost", tls=ssl.create_default_context())


async def test_commands_take_a_ca_file(
    worker: Worker,
    authority: Authority,
    server_files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "x.npy"
    numpy.save(file, x_of(2)["x"])
    async with relay(worker, server_files) as port:
        url = f"wss://127.0.0.1:{port}"

        async def run(*arguments: str) -> tuple[int, str]:
            # Each with an event loop of its own.
            code = await asyncio.to_thread(commands.main, arguments)
            return code, "".join(capsys.readouterr())

        load = ("load", url, "--input", f"x={file}", "--requests", "8", "--connections", "2")
        ca = ("--ca", str(authority.file))
        code, text = await run("predict", url, "--image", str(file), *ca)
        assert code == 0, text
        code, text = await run(*load)
        assert code == 1
        assert "gpu_service load: wss://" in text
        assert "nobody whom this client trusts has signed it" in text
        code, text = await run("predict", url, "--image", str(file))
        assert code == 1
        assert "nobody whom this client trusts has signed it" in text
        code, text = await run("predict", worker.url, "--image", str(file), *ca)
        assert code == 1
        assert "--ca: of no use for ws://127.0.0.1" in text
