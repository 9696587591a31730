# Makes nginx run the configuration whose candidates lie beside the live files, or leaves what there
# was. Runs on the gateway, as root.
#
#   nginx-activate PROBE DIGEST (SHA256 FILE)…   PROBE: where clients are served (handshake.sh);
#                                         FILE: every managed file; its candidate, where it differs,
#                                         is .NAME.candidate in the same folder
#   nginx-activate --previous             the files that the last change replaced
#
# Stands behind handshake.sh and nginx-trial.sh, whose functions it uses. Steps: the lock; the
# candidates are taken (so that no other deploy stages over them) and compared with what was sent;
# everything that the way back needs is put in its place (so that a full disk is found now); the
# candidates are checked and tried beside the live ones; swapped by renames, nginx.conf last; nginx is
# reloaded; a handshake is tried; else all goes back, by renames alone. Files that were managed once
# and are not declared any more go with the rest, and come back with it.
#
# Ends with 0 when nginx runs it, and notes DIGEST as applied; else with 1, having said why.
set -u
# The deploy may be gone, and with it whoever reads: what was begun is ended all the same.
trap '' PIPE HUP
state=/var/lib/gpu-gateway
previous=$state/previous

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

# A reload that nginx refuses leaves the old processes alone and is told to the error log only. It has
# taken over when none that accepts was there before: an old one, asked a moment too early, would
# answer for the new configuration.
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

# Fills `declared` and `changed`; nobody else touches an incoming file, who has no lock.
take_candidates() {
    local sum file found
    while (($#)); do
        sum=$1 file=$2
        shift 2
        declared+=("$file") found=$file
        rm -f "$(beside "$file" incoming)" "$(beside "$file" outgoing)"  # of a run that was cut
        if [[ -e $(beside "$file" candidate) ]]; then
            found=$(beside "$file" incoming)
            mv -fT "$(beside "$file" candidate)" "$found" || return 1
            changed+=("$file")
        fi
        if [[ $(sha256sum 2>/dev/null <"$found") != "$sum "* ]]; then
            say "$file is not what this deploy sent: the disk is full, or another deploy is at work" \
                "on this host; nothing was touched, run again"
            return 1
        fi
    done
}

# The same from what the last change replaced; what it added goes.
take_previous() {
    local file
    [[ -e $previous/changed || -e $previous/added ]] ||
        { say "there is no previous configuration on this host"; return 1; }
    mapfile -t changed < <(cat "$previous/changed" 2>/dev/null)
    mapfile -t pruned < <(cat "$previous/added" 2>/dev/null)
    mapfile -t declared < <(cat "$previous/managed" 2>/dev/null)
    for file in "${changed[@]}"; do
        cp -p "$previous$file" "$(beside "$file" incoming)" || return 1
    done
    found=$conf
    [[ ! -e $(beside "$conf" incoming) ]] || found=$(beside "$conf" incoming)
    probe=$(probe_of "$found")
}

# Files that are managed no longer. Fills `pruned`.
find_pruned() {
    local file
    while IFS= read -r file; do
        [[ ! -e $file || " ${declared[*]} " == *" $file "* ]] || pruned+=("$file")
    done < <(sort -u "$state/managed" 2>/dev/null)
}

# Everything that would need space on a disk, before anything is touched.
prepare_the_way_back() {
    local file
    rm -rf "$previous.partial"
    mkdir -p "$previous.partial" || return 1
    for file in "${changed[@]}" "${pruned[@]}"; do
        if [[ ! -e $file ]]; then
            printf '%s\n' "$file" >>"$previous.partial/added" || return 1
            continue
        fi
        printf '%s\n' "$file" >>"$previous.partial/changed" &&
            mkdir -p "$previous.partial${file%/*}" && cp -p "$file" "$previous.partial$file" &&
            ln -fT "$file" "$(beside "$file" outgoing)" || return 1
    done
    [[ ! -e $state/managed ]] || cp "$state/managed" "$previous.partial/managed" || return 1
    printf '%s\n' "$digest" >"$state/applied.candidate" &&
        printf '%s\n' "${declared[@]}" >"$state/managed.candidate"
}

swap_in() {
    local file
    for file in "${pruned[@]}"; do
        rm -f "$file" || return 1
    done
    for file in "${changed[@]}"; do
        [[ $file == "$conf" ]] || mv -fT "$(beside "$file" incoming)" "$file" || return 1
    done
    [[ ! -e $(beside "$conf" incoming) ]] || mv -fT "$(beside "$conf" incoming)" "$conf"
}

put_back() {
    local file
    # Whatever nginx took over in between: the next run is to look again.
    rm -f "$state/applied"
    for file in "${changed[@]}" "${pruned[@]}"; do
        if [[ -e $(beside "$file" outgoing) ]]; then
            mv -fT "$(beside "$file" outgoing)" "$file"
        else
            rm -f "$file"
        fi
    done
}

# What was refused lies beside the live file for a look, where there was space for it.
leave() {
    local file
    for file in "${changed[@]}"; do
        [[ ! -e $(beside "$file" incoming) ]] ||
            mv -fT "$(beside "$file" incoming)" "$(beside "$file" candidate)"
    done
    tidy
    exit 1
}

tidy() {
    local file
    for file in "${changed[@]}" "${pruned[@]}"; do
        rm -f "$(beside "$file" outgoing)"
    done
    rm -rf "$previous.partial" "$state/applied.candidate" "$state/managed.candidate"
}

conclude() {
    finish_change
    if ((${#changed[@]} + ${#pruned[@]})); then
        rm -rf "$previous"
        mv -T "$previous.partial" "$previous"
    fi
    mv -fT "$state/managed.candidate" "$state/managed"
    mv -fT "$state/applied.candidate" "$state/applied"
    tidy
    exit 0
}

mkdir -p "$apart"
exec 8>"$apart/lock"
if ! flock --wait 60 8; then
    say "another deploy has been changing this gateway for a minute; nothing was touched, run again" \
        "when it has ended"
    exit 1
fi

declared=() changed=() pruned=()
if [[ $1 == --previous ]]; then
    digest="rolled back"
    take_previous || leave
else
    probe=$1 digest=$2
    shift 2
    take_candidates "$@" || leave
    find_pruned
fi

probe_before=$(probe_of "$conf")
can_ask "$probe" "$probe_before" || leave
served_before=no silent_before=''
if [[ -n $probe_before ]]; then
    silent_before=$(silent_of "$probe_before")
    [[ $silent_before == "$(places_of "$probe_before")" ]] || served_before=yes
fi
if ! prepare_the_way_back; then
    say "could not prepare the way back (no space in $state, or beside the files?);" \
        "the live configuration is as it was"
    leave
fi

# Where clients were not served before, this configuration is not to blame: the deploy's verification
# says what is.
unserved() {
    say "port $(first_of "$2") $1 a WebSocket handshake; before this change port" \
        "$(first_of "$(without "$(places_of "$probe_before")" "$silent_before")") did"
}
lost=$(try_candidates "$probe" "${changed[@]}" "${pruned[@]}")
case $? in
    0) ;;
    "$UNSERVED")
        if [[ $served_before == yes ]]; then
            unserved "would not answer" "${lost:-$(places_of "$probe")}"
            say "tried beside the live configuration, which is as it was"
            leave
        fi
        ;;
    *) leave ;;
esac

was_active=no
! systemctl is-active --quiet nginx.service || was_active=yes
if ! swap_in; then
    put_back
    say "could not swap the files in; the live configuration is as it was"
    leave
fi
# What nginx did not take is taken back wherever it ran before. Whether clients are served says
# something of a configuration only where they were.
if reload_or_start; then
    [[ $served_before == no ]] || clients_are_served "$probe" && conclude
    unserved "does not answer" "$lost"
elif [[ $was_active == no && $served_before == no ]]; then
    tidy
    exit 1
fi
if [[ -n "${changed[*]}${pruned[*]}$old_master" ]]; then
    put_back
    if [[ -n $old_master ]]; then take_back; else reload_or_start; fi
    if [[ $served_before == no ]]; then
        say "the previous configuration is back; before this change, clients were not served either"
    elif clients_are_served "$probe_before"; then
        say "the previous configuration is back, and clients are served"
    else
        say "the previous configuration is back, but clients are still not served"
    fi
fi
tidy
exit 1
