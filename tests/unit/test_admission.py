import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.datastructures import Headers

from gpu_service import admission
from gpu_service.admission import Admission, Client, Clients, Origins, Tokens, new_token
from gpu_service.device import StartupError
from gpu_service.settings import Settings
from tests.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


# ------------------------------------------------------------------ requests a second


def taken(client: Client) -> int:
    """How many requests pass before one does not."""
    count = 0
    while client.take() == 0:
        count += 1
    return count


def test_a_burst_is_a_second_s_worth(clock: Clock) -> None:
    client = Client(requests_per_s=10, clock=clock)
    assert taken(client) == 10
    clock.now += 0.5
    assert taken(client) == 5
    clock.now += 3600
    assert taken(client) == 10


def test_less_than_one_a_second_is_one_now_and_then(clock: Clock) -> None:
    client = Client(requests_per_s=0.1, clock=clock)
    assert taken(client) == 1
    clock.now += 9.9
    assert taken(client) == 0
    clock.now += 0.11
    assert taken(client) == 1


def test_a_refused_request_is_told_when_to_come_back(clock: Clock) -> None:
    client = Client(requests_per_s=4, clock=clock)
    assert taken(client) == 4
    wait_s = client.take()
    assert wait_s == pytest.approx(0.25)
    clock.now += wait_s
    assert client.take() == 0


@given(rate=st.floats(0.01, 1000), pauses=st.lists(st.floats(0, 10), min_size=1, max_size=200))
def test_no_pattern_of_requests_gets_more_than_the_rate(rate: float, pauses: list[float]) -> None:
    clock = Clock()
    client = Client(requests_per_s=rate, clock=clock)
    began, passed = clock.now, 0
    for pause in pauses:
        clock.now += pause
        passed += client.take() == 0
        assert passed <= max(1, rate) + (clock.now - began) * rate + 1e-6


def test_all_connections_of_a_client_share_its_rate(clock: Clock) -> None:
    clients = Clients(max_requests_per_s=2, clock=clock)
    first, second, other = clients.enter("a"), clients.enter("a"), clients.enter("b")
    assert first is not None and first is second
    assert taken(first) == 2
    assert other is not None and taken(other) == 2


def test_connecting_again_gives_no_new_burst(clock: Clock) -> None:
    clients = Clients(max_requests_per_s=5, clock=clock)
    client = clients.enter("a")
    assert client is not None and taken(client) == 5
    clients.leave("a")
    clock.now += 0.2
    again = clients.enter("a")
    assert again is not None and taken(again) == 1


def test_who_has_gone_is_forgotten_when_its_rate_is_whole_again(clock: Clock) -> None:
    clients = Clients(max_requests_per_s=0.1, clock=clock)
    for number in range(100):
        clients.enter(str(number))
        clients.leave(str(number))
    assert len(clients) == 100
    clock.now += 9.9
    clients.enter("stays")
    assert len(clients) == 101
    clock.now += 0.2
    clients.enter("stays")
    assert len(clients) == 1


def test_who_comes_back_is_not_forgotten_while_it_is_there(clock: Clock) -> None:
    clients = Clients(max_requests_per_s=1, clock=clock)
    clients.enter("a")
    clients.leave("a")
    clients.enter("a")
    clock.now += 100
    clients.enter("b")
    clients.leave("b")
    assert len(clients) == 2
    clients.leave("a")
    clock.now += 100
    clients.enter("c")
    assert len(clients) == 1


def test_a_flood_of_clients_cannot_fill_the_memory(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_MOST_GONE", 10)
    clients = Clients(max_requests_per_s=0.001, clock=clock)
    for number in range(1000):
        clients.enter(str(number))
        clients.leave(str(number))
        assert len(clients) <= 10


def test_without_a_bound_nothing_is_counted(clock: Clock) -> None:
    clients = Clients(clock=clock)
    assert clients.enter("a") is None
    assert not clients.is_full("a")
    assert len(clients) == 0
    clients.leave("a")


# ------------------------------------------------------------------ connections at once


def test_a_client_is_full_until_one_of_its_connections_ends(clock: Clock) -> None:
    clients = Clients(max_connections=2, clock=clock)
    assert clients.enter("a") is None
    assert not clients.is_full("a")
    clients.enter("a")
    assert clients.is_full("a")
    assert not clients.is_full("b")
    clients.leave("a")
    assert not clients.is_full("a")
    clients.leave("a")
    assert len(clients) == 0


# ------------------------------------------------------------------ origins


ORIGINS = Origins(["https://a.com", "https://*.example.com", "http://*.local:3000"])


@pytest.mark.parametrize(
    "origin",
    [
        "https://a.com",
        "https://A.com",
        "https://www.example.com",
        "https://a-b.c_d.example.com",
        "http://dev.local:3000",
    ],
)
def test_an_allowed_origin_may_connect(origin: str) -> None:
    assert ORIGINS.allow([origin])


@pytest.mark.parametrize(
    "origin",
    [
        "http://a.com",
        "https://a.com:8443",
        "https://sub.a.com",
        "https://a.com.evil.net",
        "https://example.com",
        "https://.example.com",
        "https://evilexample.com",
        "https://wwwXexample.com",
        "https://evil.net/.example.com",
        "https://evil.net?.example.com",
        "https://evil.net#.example.com",
        "https://user@www.example.com",
        "https://www.example.com:444",
        "https://www.example.com\n",
        "http://dev.local",
        "null",
        "",
    ],
)
def test_another_origin_may_not(origin: str) -> None:
    assert not ORIGINS.allow([origin])


def test_no_origin_is_no_browser_and_two_are_a_trick() -> None:
    assert ORIGINS.allow([])
    assert not ORIGINS.allow(["https://a.com", "https://a.com"])


def test_without_a_list_every_origin_may() -> None:
    assert Origins([]).allow(["https://anything.example"])


# ------------------------------------------------------------------ tokens


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def write(path: Path, *lines: str, mode: int = 0o640) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    path.chmod(mode)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(
        tmp_path / "tokens",
        "# who may connect",
        f"{digest('one')} alice  # until June",
        "",
        f"  {digest('two').upper()}",
        f"{digest('three')} alice",
    )


def test_tokens_have_the_names_that_the_file_gives_them(file: Path) -> None:
    tokens = Tokens(file)
    assert [tokens.name_of(token) for token in ("one", "two", "three")] == ["alice", "", "alice"]
    assert tokens.name_of("four") is None
    assert tokens.name_of("") is None
    assert tokens.name_of(digest("one")) is None


def test_a_comparison_tells_nothing_by_its_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens(file)
    compared = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return known == given

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for token in ("one", "four"):
        compared.clear()
        tokens.name_of(token)
        assert len(compared) == 3


def test_a_token_that_was_made_fits_its_line(tmp_path: Path) -> None:
    token, line = new_token("alice")
    unnamed, other = new_token()
    tokens = Tokens(write(tmp_path / "tokens", line, other))
    assert (tokens.name_of(token), tokens.name_of(unnamed)) == ("alice", "")
    assert len(token) >= 43 and token != unnamed
    assert token not in line


@pytest.mark.parametrize("mode", [0o644, 0o642, 0o604])
def test_a_file_that_everybody_may_read_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(StartupError, match=f"chmod o-rwx {file}"):
        Tokens(file)


def test_what_is_wrong_with_a_file_is_said_without_its_content(tmp_path: Path) -> None:
    lines = ["a-token-itself", digest("one"), f"{digest('two')} two names", digest("x")[1:]]
    with pytest.raises(StartupError) as caught:
        Tokens(write(tmp_path / "tokens", *lines))
    assert "line 1, 3, 4: not a SHA-256" in str(caught.value)
    assert "python -m gpu_service token" in str(caught.value)
    assert "a-token-itself" not in str(caught.value)


def test_a_file_that_is_none_or_holds_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be read: No such file"):
        Tokens(tmp_path / "missing")
    with pytest.raises(StartupError, match="is not a file"):
        Tokens(tmp_path)
    with pytest.raises(StartupError, match="holds no token, so nobody could connect"):
        Tokens(write(tmp_path / "empty", "# none yet"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(StartupError, match="is not text"):
        Tokens(tmp_path / "binary")


def test_a_changed_file_is_read_anew(file: Path, tmp_path: Path) -> None:
    tokens = Tokens(file)
    write(tmp_path / "new", digest("four")).replace(file)
    assert tokens.name_of("four") == ""
    assert tokens.name_of("one") is None
    with file.open("a") as appended:
        appended.write(f"{digest('five')} bob\n")
    assert tokens.name_of("five") == "bob"


def test_a_file_that_becomes_unusable_leaves_the_tokens_before(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def problems() -> int:
        return sum(record.message == "tokens_file_unusable" for record in caplog.records)

    tokens = Tokens(file)
    write(file, "nonsense")
    assert tokens.name_of("one") == "alice"
    assert tokens.name_of("one") == "alice"
    assert problems() == 1
    file.unlink()
    assert tokens.name_of("one") == "alice"
    assert tokens.name_of("one") == "alice"
    assert problems() == 2
    write(file, digest("four"), mode=0o644)
    assert tokens.name_of("four") is None
    assert problems() == 3
    file.chmod(0o600)
    assert tokens.name_of("four") == ""
    assert tokens.name_of("one") is None


# ------------------------------------------------------------------ handshakes


def judge(
    judging: Admission, *, target: str = "/", peer: str = "192.0.2.1", **headers: str
) -> tuple[int, str, str] | str:
    """Status, code and text of a refusal, else the name of the token."""
    sent = Headers({name.replace("_", "-"): value for name, value in headers.items()})
    visitor = judging.visitor(sent, peer)
    refused = judging.judge(visitor, target=target, headers=sent)
    return visitor.name if refused is None else (refused.status, refused.code, refused.message)


@pytest.fixture
def guarded(file: Path) -> Admission:
    return Admission(clients=Clients(), tokens=Tokens(file))


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer one"},
        {"Authorization": "bearer  one "},
        {"Sec_WebSocket_Protocol": "open-inference.v2, bearer.one"},
        {"Sec_WebSocket_Protocol": "bearer.one,open-inference.v2"},
    ],
)
def test_a_token_comes_as_a_header_or_as_a_subprotocol(
    guarded: Admission, headers: dict[str, str]
) -> None:
    assert judge(guarded, **headers) == "alice"


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({}, "one token is needed: as the header `Authorization: Bearer TOKEN`"),
        ({"Authorization": "Bearer four"}, "this token is not known here"),
        ({"Authorization": "Bearer "}, "the one header must be"),
        ({"Authorization": "Basic b25lOg=="}, "the one header must be"),
        ({"Sec_WebSocket_Protocol": "open-inference.v2"}, "one token is needed"),
        ({"Sec_WebSocket_Protocol": "bearer.one, bearer.two"}, "one token is needed"),
        ({"Sec_WebSocket_Protocol": "bearer.four"}, "this token is not known here"),
        ({"Sec_WebSocket_Protocol": "bearer.\xe9"}, "this token is not known here"),
        ({"Sec_WebSocket_Protocol": "bearer."}, "this token is not known here"),
    ],
)
def test_without_a_known_token_nobody_connects(
    guarded: Admission, headers: dict[str, str], says: str
) -> None:
    refused = judge(guarded, **headers)
    assert isinstance(refused, tuple)
    assert refused[:2] == (401, "UNAUTHENTICATED")
    assert says in refused[2]


def test_two_tokens_are_one_too_many(guarded: Admission) -> None:
    headers = Headers([("Authorization", "Bearer one"), ("Authorization", "Bearer two")])
    refused = guarded.judge(guarded.visitor(headers, ""), target="/", headers=headers)
    assert refused is not None and refused.status == 401


@pytest.mark.parametrize("query", ["token=one", "x=1&Access_Token=one", "bearer=one&y"])
def test_a_token_in_the_address_is_refused_even_beside_a_good_one(
    guarded: Admission, query: str
) -> None:
    refused = judge(guarded, target=f"/infer?{query}", Authorization="Bearer one")
    assert isinstance(refused, tuple)
    assert refused[0] == 401
    assert "does not belong in an address" in refused[2]
    assert judge(guarded, target="/infer?tokens=3", Authorization="Bearer one") == "alice"


def test_a_refused_origin_is_told_so_before_its_token_is_looked_at(file: Path) -> None:
    judging = Admission(clients=Clients(), tokens=Tokens(file), origins=["https://a.com"])
    refused = judge(judging, Origin="https://b.com", Authorization="Bearer one")
    assert isinstance(refused, tuple)
    assert refused[:2] == (403, "PERMISSION_DENIED")
    assert judge(judging, Origin="https://a.com", Authorization="Bearer one") == "alice"


def test_a_named_token_is_one_client_from_wherever_it_comes(file: Path, clock: Clock) -> None:
    clients = Clients(max_connections=1, clock=clock)
    judging = Admission(clients=clients, tokens=Tokens(file))
    headers = Headers({"Authorization": "Bearer one"})
    visitor = judging.visitor(headers, "192.0.2.1")
    assert judging.judge(visitor, target="/", headers=headers) is None
    clients.enter(visitor.client)
    refused = judge(judging, peer="192.0.2.2", Authorization="Bearer three")
    assert refused == (429, "RESOURCE_EXHAUSTED", "alice has as many connections as it may")
    assert judge(judging, Authorization="Bearer two") == ""


def client_of(judging: Admission, peer: str, *real: str) -> str:
    headers = Headers([("X-Real-IP", address) for address in real])
    return judging.visitor(headers, peer).client.removeprefix("address ")


@pytest.mark.parametrize(
    ("peer", "real", "client"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.7"], "192.0.2.1"),  # anybody may say so
        ("127.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("::1", ["198.51.100.7"], "198.51.100.7"),
        ("", ["198.51.100.7"], "198.51.100.7"),
        ("10.1.2.3", ["198.51.100.7"], "198.51.100.7"),
        ("::ffff:10.1.2.3", ["198.51.100.7"], "198.51.100.7"),
        ("2001:db8::7", ["198.51.100.7"], "198.51.100.7"),
        ("10.1.2.3", ["nonsense"], "10.1.2.3"),
        ("10.1.2.3", ["198.51.100.7", "198.51.100.8"], "10.1.2.3"),
        ("10.1.2.3", [], "10.1.2.3"),
        ("::ffff:192.0.2.1", [], "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", [], "2001:db8:1:2::/64"),
        ("fe80::1%eth0", [], "fe80::/64"),
        ("127.0.0.1", ["2001:db8:1:2:ffff::1"], "2001:db8:1:2::/64"),
        ("", [], "None"),
    ],
)
def test_a_client_without_a_name_is_its_address(
    peer: str, real: Sequence[str], client: str
) -> None:
    judging = Admission(clients=Clients(), trusted_proxies=["10.0.0.0/8", "2001:db8::7"])
    assert client_of(judging, peer, *real) == client


@pytest.mark.parametrize(
    ("peer", "told", "client"),
    [
        ("10.1.2.3", ["CN=me"], "certificate CN=me"),
        ("127.0.0.1", ["CN=me"], "certificate CN=me"),
        ("192.0.2.1", ["CN=me"], "address 192.0.2.1"),  # anybody may say so
        ("10.1.2.3", ["CN=me", "CN=you"], "address 10.1.2.3"),
        ("10.1.2.3", ["x" * 257], "address 10.1.2.3"),
        ("10.1.2.3", [""], "address 10.1.2.3"),
    ],
)
def test_a_certificate_that_a_gateway_has_checked_names_its_client(
    peer: str, told: Sequence[str], client: str
) -> None:
    judging = Admission(clients=Clients(), trusted_proxies=["10.0.0.0/8"])
    headers = Headers([("X-Client-Name", name) for name in told])
    visitor = judging.visitor(headers, peer)
    assert visitor.client == client
    assert visitor.name == client.partition("certificate ")[2]
    assert judging.judge(visitor, target="/", headers=headers) is None


def test_a_proxy_that_is_not_trusted_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    judging = Admission(clients=Clients())
    for _ in range(3):
        client_of(judging, "10.1.2.3", "198.51.100.7")
    assert [record.message for record in caplog.records] == ["proxy_not_trusted"]


def test_a_session_has_the_id_that_the_gateway_gave_it() -> None:
    judging = Admission(clients=Clients())

    def request_id(*told: str) -> str:
        headers = Headers([("X-Request-ID", text) for text in told])
        return judging.visitor(headers, "").request_id

    assert request_id("a.B-9_") == "a.B-9_"
    for told in ([], [""], ["x" * 129], ["a b"], ['"'], ["a", "b"]):
        made = request_id(*told)
        assert len(made) == 32
        assert int(made, 16) >= 0
        assert made != request_id(*told)


def test_the_parent_of_traces_is_kept_if_there_is_one_of_a_bearable_length() -> None:
    judging = Admission(clients=Clients())

    def parent(*told: str) -> str | None:
        return judging.visitor(Headers([("traceparent", text) for text in told]), "").trace_parent

    usual = f"00-{'a' * 32}-{'b' * 16}-01"
    assert parent(usual) == usual
    assert parent() is None
    assert parent(usual, usual) is None
    assert parent(f"cc-{'a' * 8000}") is None


def test_settings_say_it_all(file: Path) -> None:
    settings = Settings(
        bundle=(Path("unused"),),
        tokens_file=str(file),
        origins="https://a.com, https://*.b.com",
        trusted_proxies="10.0.0.0/8",
        max_connections_per_client=1,
    )
    judging = Admission.of(settings)
    assert judge(judging, Origin="https://x.b.com", Authorization="Bearer one") == "alice"
    assert client_of(judging, "10.0.0.1", "192.0.2.1") == "192.0.2.1"
    judging.clients.enter("address 192.0.2.1")
    refused = judge(judging, Authorization="Bearer two")
    assert isinstance(refused, tuple) and refused[0] == 429
