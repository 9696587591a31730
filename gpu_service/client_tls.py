"""TLS as a client sees it: whom it trusts, what it shows of itself, and why a server was refused.

Owns the only place where a client's `ssl.SSLContext` is made, and the words for its errors: those
of OpenSSL name a number and a source file. Needs nothing but the standard library.
"""

import ssl
from pathlib import Path


class TlsFilesError(Exception):
    """A file that TLS was to use cannot be; the message says which and why."""


def context(
    *, ca: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """What a client needs for `wss://`; the server's certificate and name are always checked.

    `ca`: PEM file of the authorities to trust, or the server's own certificate (default: those of
    the system, or of SSL_CERT_FILE in the environment). `certificate`, `key`: PEM files to show to
    a server that asks for a certificate; the key may stand in the first. Raises TlsFilesError.
    """
    if key is not None and certificate is None:
        raise TlsFilesError(f"{key} is the key of a certificate, and none is given")
    for path in (ca, certificate, key):
        if path is not None:
            _readable(path)
    try:
        made = ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise TlsFilesError(f"{ca} holds no certificate in PEM format") from None
    if certificate is not None:
        _show(made, certificate, key)
    return made


def _readable(path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise TlsFilesError(f"{path} cannot be read: {error.strerror}") from None


def _show(made: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    try:
        # Without a password it would be asked for on the terminal.
        made.load_cert_chain(certificate, key, password=_no_password)
    except TlsFilesError:
        problem = f"{key or certificate} is encrypted; use a key without a password"
        raise TlsFilesError(problem) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsFilesError(f"{key} is not the key of {certificate}") from None
        where = certificate if key is None else f"{certificate} or {key}"
        raise TlsFilesError(f"{where} holds no certificate with its key in PEM format") from None


def _no_password() -> str:
    raise TlsFilesError


NO_TLS = "that port does not speak TLS; use ws:// there, or the gateway's TLS port"

# https://docs.openssl.org/master/man3/X509_STORE_CTX_get_error/
_EXPIRED, _NOT_YET, _REVOKED = 10, 9, 23
_UNTRUSTED = frozenset({2, 18, 19, 20, 21, 24})
_OTHER_NAME = frozenset({62, 64})
_PURPOSE = 26


def explained(error: ssl.SSLError) -> str:
    """What is wrong between this client and the server, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {_refusal(error)}"
    match error.reason:
        case "WRONG_VERSION_NUMBER" | "HTTP_REQUEST" | "RECORD_LAYER_FAILURE":
            return NO_TLS
        case "TLSV13_ALERT_CERTIFICATE_REQUIRED" | "SSLV3_ALERT_HANDSHAKE_FAILURE":
            return "the TLS handshake was refused; it may ask for a certificate of the client"
        case "TLSV1_ALERT_UNKNOWN_CA" | "SSLV3_ALERT_BAD_CERTIFICATE":
            return "it does not accept this client's certificate; have it issued by its authority"
        case _:
            return f"TLS failed: {(error.reason or str(error)).replace('_', ' ').lower()}"


def _refusal(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code in _UNTRUSTED:
        return (
            "nobody whom this client trusts has signed it; give the authority's certificate, or "
            "the server's own, as the CA file (--ca, SSL_CERT_FILE), if it is the right server"
        )
    if code == _EXPIRED:
        return "it has expired; whoever runs the server has to renew it (or this clock is wrong)"
    if code == _NOT_YET:
        return "it is not valid yet; check the clocks of this machine and of the server"
    if code in _OTHER_NAME:
        return (
            f"it is for another name ({error.verify_message.rstrip('.')}); use the name that the "
            "certificate is for"
        )
    if code == _REVOKED:
        return "its authority has revoked it; do not trust this server"
    if code == _PURPOSE:
        return "it is not meant for a server; use one with the purpose serverAuth"
    return error.verify_message
