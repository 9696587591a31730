"""Turns settings into the text of files. Pure: templates in, bytes out, no host involved.

Templates hold no logic that belongs in `settings.py`; an undefined name is an error that says
file and line.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from provision import lint
from provision.settings import Fleet, GatewaySettings

CHECKOUT = Path(__file__).resolve().parent.parent
TEMPLATES = CHECKOUT / "templates"
FILES = CHECKOUT / "files"
STATIC_FILES = (
    "404.html",
    "50x.html",
    "nginx.logrotate",
    "handshake.sh",
    "nginx-activate.sh",
    "worker-switch.sh",
)


class RenderError(Exception):
    """A template that cannot be used: file, line and reason."""


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701  configuration files, not HTML; settings are typed tokens
    )


def render(template: str, **values: Any) -> bytes:
    """The template's text, UTF-8. Raises `RenderError` naming file and line."""
    try:
        return _environment().get_template(template).render(**values).encode()
    except jinja2.TemplateSyntaxError as error:
        where = f"templates/{error.name or template}:{error.lineno}"
        raise RenderError(f"{where}: {error.message}") from None
    except jinja2.TemplateNotFound as error:
        raise RenderError(f"templates/{error.name}: no such template; restore it") from None
    except jinja2.TemplateError as error:
        where = f"templates/{template}:{_line_of(error, template)}"
        raise RenderError(f"{where}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RenderError(f"templates/{template}: cannot be read: {error}") from None


def _line_of(error: jinja2.TemplateError, template: str) -> int:
    line, traceback = 0, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename.endswith(template):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def static(name: str) -> bytes:
    """A file of `files/`, as it is. Raises `RenderError`."""
    try:
        return (FILES / name).read_bytes()
    except OSError as error:
        raise RenderError(f"files/{name}: cannot be read: {error.strerror}; restore it") from None


def shell(name: str) -> str:
    """A script of `files/`, for `bash -c`. Raises `RenderError`."""
    return static(name).decode()


def nginx_conf(gateway: GatewaySettings, fleet: Fleet) -> bytes:
    """nginx.conf of one gateway."""
    return render("nginx.conf.j2", gateway=gateway, upstream_servers=fleet.upstream_servers())


def check_all(fleet: Fleet) -> None:
    """Render everything that the deploy would render, so that a fault shows before it begins."""
    for name, gateway in fleet.gateways.items():
        _lint(name, nginx_conf(gateway, fleet).decode())
        render("nginx-limits.conf.j2", gateway=gateway)
    for worker in fleet.workers.values():
        render("gpu-worker@.service.j2", **unit_placeholders(), worker=worker)
        render("gpu-worker@.socket.j2", **unit_placeholders(), worker=worker)
    for name in STATIC_FILES:
        static(name)


def _lint(host: str, text: str) -> None:
    try:
        faults = [str(finding) for finding in lint.lint(text)]
    except lint.UnparsableError as error:
        faults = [str(error)]
    if faults:
        where = f"templates/nginx.conf.j2, as rendered for {host}"
        raise RenderError(f"{where}: {'; '.join(faults)}")


def unit_placeholders() -> dict[str, Any]:
    """Stand-ins for what is known only on the host, for a trial rendering."""
    return {
        "settings_dir": "/nonexistent",
        "allowed_addresses": ["192.0.2.1"],
        "has_gpu": False,
    }
