# Makes one worker run what its settings file says, on a listening socket of systemd's or its own, as
# that file says. Runs on the worker's host, as root.
#
#   worker-switch UNIT SETTINGS CANDIDATE SHA256
#                                            CANDIDATE, which has this digest, becomes SETTINGS; what
#                                            ran before comes back if the worker does not get ready
#   worker-switch --previous UNIT SETTINGS   SETTINGS and SETTINGS.rollback change places
#
# Settings change under a lock alone, so that no run takes another's for what it was before. Within
# it, SETTINGS.previous is what to come back to; where it is there at the beginning, a run was killed.
#
# Ends with 0 when the worker is ready; else with 1, having said why.
set -u
# The deploy may be gone, and with it whoever reads: what was begun is ended all the same.
trap '' PIPE HUP

say() { printf '%s\n' "$*" >&2; }

last_words() { journalctl -u "$unit" -n 20 --no-pager -o cat >&2; }

# Opened by the unit file that lies there: a socket is not changed by a reload of systemd.
socket_is_current() {
    local opened written
    systemctl is-active --quiet "$socket" || return 1
    opened=$(date -d "$(systemctl show "$socket" -p ActiveEnterTimestamp --value)" +%s)
    written=$(stat -c %Y "$(systemctl show "$socket" -p FragmentPath --value)")
    ((opened >= written))
}

start_worker() {
    if grep -qx GPU_WORKER_SOCKET=systemd "$settings"; then
        if ! socket_is_current; then
            # systemd opens no socket beside a service that runs. From here until it is open,
            # connects are refused; afterwards never again.
            systemctl stop "$unit" "$socket" || return 1
            systemctl start "$socket" || return 1
        fi
        systemctl enable --quiet "$socket"
    elif systemctl is-active --quiet "$socket" || systemctl is-enabled --quiet "$socket"; then
        # Also what a release that knows nothing of such sockets needs, to bind its own.
        systemctl disable --quiet "$socket"
        systemctl stop "$unit" "$socket" || return 1
    fi
    systemctl restart "$unit"
}

# What a deploy that was cut began here is waited for, whatever it comes to.
waited=
take_turn() {
    exec 8>"/run/$unit.lock"
    flock --nonblock 8 && return
    waited=yes
    flock --wait 600 8 && return
    say "another deploy has been restarting $unit for ten minutes; nothing was touched, run again"
    exit 1
}

# SETTINGS: whether the process that runs was started with them.
runs() {
    local pid declared
    systemctl is-active --quiet "$unit" || return 1
    declared=$(grep '^GPU_SERVICE_DEPLOYMENT=' "$1") || return 1
    pid=$(systemctl show "$unit" -p MainPID --value)
    tr '\0' '\n' <"/proc/$pid/environ" | grep -qxF "$declared"
}

socket_is_declared() {
    if grep -qx GPU_WORKER_SOCKET=systemd "$1"; then
        socket_is_current
    else
        ! systemctl is-active --quiet "$socket"
    fi
}

# What ran last is what there is to come back to. After a run that was killed that is no more what
# lies there, unless the worker came up with it.
keep_previous() {
    [[ -f $settings ]] && ! cmp -s "$candidate" "$settings" || return 0
    [[ -f $settings.previous ]] && ! runs "$settings" && return
    cp -p "$settings" "$settings.previous"
}

if [[ $1 == --previous ]]; then
    unit=$2 settings=$3 socket=${2%.service}.socket
    take_turn
    # Of a run that was killed: what ran before its change.
    [[ ! -f $settings.previous ]] || mv -f "$settings.previous" "$settings.rollback"
    [[ -f $settings.rollback ]] || { say "$unit has run nothing else before"; exit 1; }
    # The two change places, so that a second rollback goes forward again.
    mv -f "$settings" "$settings.previous" && mv -f "$settings.rollback" "$settings" || exit 1
    if start_worker; then
        mv -f "$settings.previous" "$settings.rollback"
        exit 0
    fi
    say "$unit failed to become ready with what it ran before; its last words:"
    last_words
    mv -f "$settings" "$settings.rollback"
    mv -f "$settings.previous" "$settings"
    start_worker
    exit 1
fi

unit=$1 settings=$2 candidate=$3 sha256=$4 socket=${1%.service}.socket
take_turn
if [[ ! -f $candidate || $(sha256sum <"$candidate") != "$sha256 "* ]]; then
    say "$candidate is not what was sent: it arrived damaged, or another deploy put its own there;" \
        "$unit is as it was, run again"
    exit 1
fi
# The deploy that was waited for may have been all there is to do.
if [[ $waited ]] && runs "$candidate" && socket_is_declared "$candidate"; then
    mv -fT "$candidate" "$settings"
    exit
fi
keep_previous && mv -fT "$candidate" "$settings" || exit 1
if start_worker; then
    [[ ! -f $settings.previous ]] || mv -f "$settings.previous" "$settings.rollback"
    exit 0
fi
say "$unit failed to become ready; its last words:"
last_words
[[ -f $settings.previous ]] || exit 1
mv -f "$settings.previous" "$settings"
start_worker && say "$unit serves again what it served before"
exit 1
