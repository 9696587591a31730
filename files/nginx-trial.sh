# try_candidates PROBE FILE…: the candidates of this host's nginx, checked and tried beside the live
# one, which does not notice. FILE: what changes; its new content is .NAME.incoming beside it, and
# where there is none, FILE goes. Status 0: nginx accepts it, and clients would be served; $REFUSED:
# nginx -t does not accept it, or somebody else has its port; $UNSERVED: clients would not be served,
# at the places that it prints.
#
# All of it happens in namespaces that end with it, whatever ends it. In its own mounts the changed
# folders are copies in which the candidates are in place, under their real names, and logs and pid
# file are its own: `nginx -t` from a shell leaves a pid file of the wrong SELinux type behind, with
# which the next start fails (nginx/nginx#816). In its own network every port is free, so nginx opens
# the very ports that are declared; then it is executed anew, as for a new binary (USR2), in the
# host's network, and keeps those sockets: the handshake comes in by the private ports and goes out
# to the workers on the way on which clients' will. `nginx -t` is asked in the host's network, where
# names of upstreams are found.
# https://nginx.org/en/docs/control.html#upgrade
#
# Stands behind handshake.sh, whose functions it uses.
REFUSED=3 UNSERVED=4
apart=/run/gpu-gateway
conf=/etc/nginx/nginx.conf

say() { printf '%s\n' "$*" >&2; }

# beside FILE candidate|incoming|outgoing: the name in the same folder. None of them ends in what
# an include asks for.
beside() { printf '%s/.%s.%s' "${1%/*}" "${1##*/}" "$2"; }

try_candidates() {
    local tool
    for tool in ip ss unshare nsenter; do
        type -P "$tool" >/dev/null && continue
        say "the trial could not be started: $tool is missing on this host; install it (ip and ss are" \
            "in the package iproute, or iproute2; the others in util-linux)"
        return "$REFUSED"
    done
    mkdir -p "$apart"
    foreign=$(ss -ltnpH | grep -v '(("nginx",' | awk '{ print $4, $NF }')
    # Descriptor 9: the host's network. The lock (8) is not for what starts in there.
    unshare --mount --propagation private --net --pid --kill-child -- \
        bash -c "$(declare -f); $(declare -p REFUSED UNSERVED apart conf foreign silent_before)"'; _try "$@"' try "$@" \
        9</proc/self/ns/net 8>&-
}

_try() {
    local probe=$1
    shift
    if ! _furnish "$@"; then
        say "the candidates cannot be tried on this host; the live configuration is as it was"
        return "$REFUSED"
    fi
    if ! _in_the_hosts_network nginx -t -q; then
        say "refused by nginx -t of this host; the live configuration is as it was"
        return "$REFUSED"
    fi
    if ! _prepare_its_network; then
        say "the trial could not be started: its network could not be prepared; the live" \
            "configuration is as it was"
        return "$REFUSED"
    fi
    if ! _start_beside; then
        say "the trial could not be started: nginx ended at once; its error log says:"
        tail -n 5 "$apart/log/error.log" >&2
        return "$UNSERVED"
    fi
    _ports_are_free || return "$REFUSED"
    _enter_the_hosts_network && clients_are_served "$probe" && return 0
    printf '%s\n' "${lost-}"
    _why >&2
    return "$UNSERVED"
}

# Copies of the folders, with the candidates in place. In memory: the disk may be full.
_furnish() {
    local folder file
    mount -t tmpfs -o mode=700 gateway-trial "$apart" || return 1
    for folder in $(printf '%s\n' "${conf%/*}" "${@%/*}" | sort -u); do
        mkdir -p "$folder" "$apart/tree$folder" || return 1
        [[ ! $folder -ef $apart/tree$folder ]] || continue  # below one that is a copy already
        cp -a "$folder/." "$apart/tree$folder" &&
            mount --bind "$apart/tree$folder" "$folder" || return 1
    done
    for file; do
        if [[ -e $(beside "$file" incoming) ]]; then
            mv -fT "$(beside "$file" incoming)" "$file" || return 1
        else
            rm -f "$file"
        fi
    done
    mkdir "$apart/log" && mount --bind "$apart/log" /var/log/nginx || return 1
    # Whatever this nginx takes for its pid file, the one of the live nginx stays.
    if [[ -e /run/nginx.pid ]]; then
        cp -a /run/nginx.pid "$apart/live.pid" && mount --bind "$apart/live.pid" /run/nginx.pid || return 1
    fi
    sed -i -e "s|^pid .*|pid $apart/nginx.pid;|" -e 's|^worker_processes .*|worker_processes 1;|' "$conf"
}

_in_the_hosts_network() { nsenter --net=/proc/self/fd/9 -- "$@"; }

_prepare_its_network() {
    local setting
    ip link set lo up || return 1
    for setting in /proc/sys/net/ipv{4,6}/ip_nonlocal_bind; do  # the host's addresses are not here
        [[ ! -w $setting ]] || echo 1 >"$setting"
    done
    : >>/etc/hosts
    cp -L /etc/hosts "$apart/hosts" && mount --bind "$apart/hosts" /etc/hosts && _learn_names
}

# nginx looks the names of its configuration up when it starts, and nobody answers in its own
# network: those that it misses are written down as the host's network knows them. nginx stops at the
# first one that it does not find, and says which.
_learn_names() {
    local name asked=''
    for _ in $(seq 100); do
        name=$(nginx -t -q 2>&1 | sed -n 's/.*host not found in [^"]*"\([^":/]*\).*/\1/p' | head -n 1)
        [[ -n $name && $name != "$asked" ]] || break
        asked=$name
        _in_the_hosts_network getent ahosts "$name" |
            awk -v name="$name" '$2 == "STREAM" && $1 !~ /%/ { print $1, name }' >>"$apart/hosts"
    done
    : >"$apart/log/error.log"  # what it says from here on is of its start
}

_start_beside() {
    # What nginx executes on USR2 is what it was called by.
    printf '#!/bin/sh\nexec nsenter --net=/proc/self/fd/9 -- "%s" "$@"\n' "$(type -P nginx)" \
        >"$apart/nginx" && chmod 755 "$apart/nginx" && (exec -a "$apart/nginx" nginx)
}

# Whether two listening addresses exclude each other on one port; `*` is both families.
_overlap() {
    [[ $1 != "$2" && $1 != '*' && $2 != '*' ]] || return 0
    case "$1 $2" in
        '0.0.0.0 ['* | '['*' 0.0.0.0') return 1 ;;
        '0.0.0.0 '* | *' 0.0.0.0' | '[::] ['* | '['*' [::]') return 0 ;;
    esac
    return 1
}

# A reload that finds a port taken is refused in silence.
_ports_are_free() {
    local wanted other who
    for wanted in $(ss -ltnH | awk '{ print $4 }'); do
        while read -r other who; do
            [[ ${other##*:} == "${wanted##*:}" ]] && _overlap "${other%:*}" "${wanted%:*}" || continue
            say "port ${wanted##*:} is taken on this host, by $(cut -d '"' -f 2 <<<"$who")" \
                "(bind() to $wanted would fail); the live configuration is as it was"
            return 1
        done <<<"$foreign"
    done
}

# The master of the host's network takes the pid file of the other, whose name gets .oldbin, and loses
# it again when it fails to start: only another number in the pid file, and no .oldbin after that, says
# that it alone serves. Asked before it has begun to wait for signals, a master notes USR2 and sleeps
# on; asked again, it ignores what it has begun already.
_enter_the_hosts_network() {
    local pid=$apart/nginx.pid first now
    first=$(cat "$pid" 2>/dev/null)  # none where it runs a configuration of its own
    for _ in $([[ -z $first ]] || seq 200); do
        now=$(cat "$pid" 2>/dev/null)
        if [[ -n $now && $now != "$first" ]]; then
            [[ -e $pid.oldbin ]] || return 0
            kill -TERM "$first" 2>/dev/null
        elif [[ ! -e $pid.oldbin ]]; then
            kill -USR2 "$first" || break
        fi
        sleep 0.05
    done
    say "nginx could not be started beside the live one"
    return 1
}

# What went wrong first: a back end that failed is left out from then on, and what is said of that
# hides why.
_why() {
    local log=$apart/log/error.log
    grep -v -e '\[notice\]' -e '\[warn\]' -e 'no live upstreams' "$log" | head -n 3 | grep . ||
        grep -v '\[notice\]' "$log" | head -n 2
}
