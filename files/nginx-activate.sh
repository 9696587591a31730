# Makes nginx run the configuration whose candidates lie beside the live files; if clients were
# served before and are not afterwards, puts back what was there. Runs on the gateway, as root.
#
#   nginx-activate PROBE DIGEST FILE…     PROBE: where clients are served (handshake.sh); FILE: every managed file; its candidate, where it
#                                         differs, is .NAME.candidate in the same folder
#   nginx-activate --previous             the files that the last change replaced
#
# Stands behind handshake.sh, whose functions it uses.
# Ends with 0 when nginx runs it, and notes DIGEST as applied; else with 1, having said why.
set -u
state=/var/lib/gpu-gateway
previous=$state/previous
conf=/etc/nginx/nginx.conf

say() { printf '%s\n' "$*" >&2; }

candidate_of() { printf '%s/.%s.candidate' "${1%/*}" "${1##*/}"; }

# Where a configuration serves clients; nothing before the first deploy.
probe_of() {
    sed -n -e 's/^ *# Probed by the deploy: //p' -e 's/^ *listen \([0-9]*\) default_server.*/\1/p' \
        "$1" 2>/dev/null | head -n 1
}

first_of() { printf '%s' "${1%%$'\n'*}" | sed 's/^tls://'; }

master() { cat /run/nginx.pid 2>/dev/null; }

accepting() {
    # Processes of a master (the one of the pid file) that take new connections; those of a former
    # configuration say so in their title.
    local of=${1:-$(master)}
    [[ -n $of ]] || return 0
    pgrep -P "$of" --list-full 2>/dev/null | grep 'worker process' | grep -v 'shutting down' |
        cut -d ' ' -f 1 | sort
}

# A reload that nginx refuses (a port that is taken, say) leaves the old processes alone and is
# told to the error log only. It has taken over when none that accepts was there before: an old
# one, asked a moment too early, would answer for the new configuration.
took_over() {
    local before=$1 now
    for _ in $(seq 100); do
        now=$(accepting)
        if [[ -n $now && -z $(comm -12 <(printf '%s\n' "$before") <(printf '%s\n' "$now")) ]]; then
            return 0
        fi
        sleep 0.1
    done
    say "nginx did not take the configuration over; its error log says:"
    tail -n 5 /var/log/nginx/error.log >&2
    return 1
}

# ---- another binary than the one that runs -----------------------------------------------------
# A restart would close every socket. Instead a master of the new binary is started by the old one,
# which hands it the listening sockets; the old one's workers live as long as their sockets.
# https://nginx.org/en/docs/control.html#upgrade

old_master=  # set from when a new binary takes over until it has proved itself

binary_changed() {
    local running; running=/proc/$(master)/exe
    [[ -e $running && ! $running -ef $(command -v nginx) ]]
}

# Whether a condition comes true within ten seconds.
soon() {
    for _ in $(seq 100); do
        "$@" && return 0
        sleep 0.1
    done
    return 1
}

is_gone() { ! kill -0 "$1" 2>/dev/null; }
accepts() { [[ -n $(accepting "$1") ]]; }
accepts_nothing() { ! accepts "$1"; }
is_master() { [[ $(master) == "$1" ]]; }

# A master whose own parent still is a master, holding sockets of the binary before, ignores USR2.
# Killed, that one leaves its workers alone: they go on until their sockets close.
release_former_master() {
    local parent; parent=$(ps -o ppid= -p "$1" | tr -d ' ')
    [[ $(tr '\0' ' ' 2>/dev/null <"/proc/$parent/cmdline") == "nginx: master process"* ]] || return 0
    kill -s KILL "$parent" && soon is_gone "$parent" && rm -f /run/nginx.pid.oldbin
}

change_binary() {
    local before; before=$(accepting)
    old_master=$(master)
    release_former_master "$old_master"
    kill -s USR2 "$old_master"
    if took_over "$before"; then
        # Its workers take no new connections from here on, or they would answer the probe.
        kill -s WINCH "$old_master" && soon accepts_nothing "$old_master"
        return
    fi
    say "the nginx that was installed did not take over from the one that runs, which goes on"
    return 1
}

# The old master has let its workers go; it ends when their sockets are closed.
finish_change() {
    [[ -z $old_master ]] || kill -s QUIT "$old_master"
    old_master=
}

# Back to the binary that ran: its master starts workers again, with the configuration that it has.
take_back() {
    local new; new=$(master)
    if [[ $new != "$old_master" ]]; then
        kill -s HUP "$old_master" && soon accepts "$old_master"
        kill -s TERM "$new"
        soon is_master "$old_master"
    fi
    say "the binary that ran before runs again, until the next deploy; the installed one is still" \
        "$(nginx -v 2>&1 | sed 's/^nginx version: //')"
    old_master=
}

reload_or_start() {
    local before
    systemctl daemon-reload  # the descriptor limit is a drop-in of the unit
    if systemctl is-active --quiet nginx.service; then
        if binary_changed; then
            change_binary
            return
        fi
        before=$(accepting)
        systemctl reload nginx.service && took_over "$before"
    elif ! systemctl start nginx.service; then
        say "nginx does not start; its last words:"
        journalctl -u nginx.service -n 20 --no-pager -o cat >&2
        return 1
    fi
}

swapped=  # set when files were

swap_in() {
    local any=
    for file; do [[ ! -e $(candidate_of "$file") ]] || any=yes; done
    [[ -n $any ]] || return 0  # what the last change replaced stays what a rollback goes back to
    rm -rf "$previous.partial"
    mkdir -p "$previous.partial" || return 1
    for file; do
        [[ -e $(candidate_of "$file") ]] || continue
        printf '%s\n' "$file" >>"$previous.partial/changed"
        [[ -e $file ]] || continue
        mkdir -p "$previous.partial${file%/*}" && cp -p "$file" "$previous.partial$file" || return 1
    done
    rm -rf "$previous"
    mv -T "$previous.partial" "$previous" || return 1
    swapped=yes
    for file; do
        [[ ! -e $(candidate_of "$file") ]] || mv -fT "$(candidate_of "$file")" "$file" || return 1
    done
}

put_back() {
    # Whatever nginx took over in between: the next run is to look again.
    rm -f "$state/applied"
    [[ -z $swapped ]] || while IFS= read -r file; do
        if [[ -e $previous$file ]]; then
            cp -p "$previous$file" "$(candidate_of "$file")" && mv -fT "$(candidate_of "$file")" "$file"
        else
            rm -f "$file"
        fi
    done <"$previous/changed"
    if [[ -n $old_master ]]; then take_back; else reload_or_start; fi
}

# Candidates from what the last change replaced; a file that it added stays.
stage_previous() {
    [[ -s $previous/changed ]] || { say "there is no previous configuration on this host"; return 1; }
    mapfile -t files <"$previous/changed"
    for file in "${files[@]}"; do
        [[ ! -e $previous$file ]] || cp -p "$previous$file" "$(candidate_of "$file")" || return 1
    done
    checked=$conf
    [[ ! -e $(candidate_of "$conf") ]] || checked=$(candidate_of "$conf")
    probe=$(probe_of "$checked") digest="rolled back"
    nginx -t -q -c "$checked"
}

if [[ $1 == --previous ]]; then
    stage_previous || exit 1
else
    probe=$1 digest=$2 files=("${@:3}")
fi

probe_before=$(probe_of "$conf")
served_before=no silent_before=''
if [[ -n $probe_before ]]; then
    silent_before=$(silent_of "$probe_before")
    [[ $silent_before == "$(places_of "$probe_before")" ]] || served_before=yes
fi
swap_in "${files[@]}" || { say "could not swap the files in; run again when that is mended"; exit 1; }
if reload_or_start; then
    # Where clients were not served before, this configuration is not to blame: the deploy's
    # verification says what is.
    if [[ $served_before == no ]] || clients_are_served "$probe"; then
        finish_change
        printf '%s\n' "$digest" >"$state/applied.candidate" && mv -f "$state/applied.candidate" "$state/applied"
        exit 0
    fi
    say "port $(first_of "$lost") does not answer a WebSocket handshake; before this change port $(first_of "$(without "$(places_of "$probe_before")" "$silent_before")") did"
fi
if [[ $served_before == yes && -n $swapped$old_master ]]; then
    put_back
    if clients_are_served "$probe_before"; then
        say "the previous configuration is back, and clients are served"
    else
        say "the previous configuration is back, but clients are still not served"
    fi
fi
exit 1
