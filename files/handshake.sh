# handshake_status PLACE: the status line with which this host answers a WebSocket handshake. PLACE is
# `[tls:]PORT[@NAME][/PATH]`: by TLS or not, the port, the host name that is asked for, the path.
# bash opens the socket itself, so that no client has to be installed; for TLS it takes curl.
#
# A PROBE is one or more places with commas between them, and behind them, each after a blank, other
# statuses by which a request without a certificate or credentials shows that it was understood.
# places_of PROBE: its places, a line each. is_served STATUS PROBE: whether a worker answered so, or
# nginx as PROBE says; 401 is that of a worker which wants a token, and none was sent.
# silent_of PROBE: the places where nobody does, a line each. clients_are_served PROBE: whether there
# is none but those of $silent_before; the others are in $lost then.
handshake_status() {
    local place=$1 port name=localhost path=/ line='' pid
    local -a headers=('Connection: Upgrade' 'Upgrade: websocket' 'Sec-WebSocket-Version: 13'
        'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==')
    [[ $place != */* ]] || { path=/${place#*/} place=${place%%/*}; }
    [[ $place != *@* ]] || { name=${place#*@} place=${place%%@*}; }
    port=${place#tls:}
    if [[ $place == tls:* ]]; then
        # Whether the certificate convinces clients is not asked here. What curl says of its work is
        # not buffered, as the answer itself is until the connection ends.
        exec 3< <(exec curl --silent --verbose --insecure --http1.1 --max-time 10 \
            --resolve "$name:$port:127.0.0.1" "${headers[@]/#/-H}" "https://$name:$port$path" \
            2>&1 >/dev/null)
        pid=$!
        while IFS= read -r -t 10 -u 3 line && [[ $line != '< HTTP/'* ]]; do line=''; done
        line=${line#< }
    else
        exec 3<>"/dev/tcp/127.0.0.1/$port" || return 1
        printf '%s\r\n' "GET $path HTTP/1.1" "Host: $name" "${headers[@]}" '' >&3
        IFS= read -r -t 10 -u 3 line
    fi
    exec 3>&-
    [[ -z ${pid-} ]] || kill "$pid" 2>/dev/null
    printf '%s\n' "${line%$'\r'}"
}

# can_ask PROBE…: whether this host has what it takes. Without it, nothing would seem to be served.
can_ask() {
    [[ $* != *tls:* ]] || type -P curl >/dev/null && return
    printf '%s\n' "curl is missing on this host, by which a handshake through TLS is tried; install it" >&2
    return 1
}

places_of() { printf '%s\n' "${1%% *}" | tr , '\n'; }

is_served() {
    local status
    for status in 101 401 $([[ $2 != *' '* ]] || printf '%s' "${2#* }"); do
        [[ $1 != *" $status "* ]] || return 0
    done
    return 1
}

# More than once: a worker that is just being restarted must not condemn a configuration.
silent_of() {
    local place
    local -a asked silent
    mapfile -t asked < <(places_of "$1")
    for _ in $(seq 5); do
        silent=()
        for place in "${asked[@]}"; do
            is_served "$(handshake_status "$place" 2>/dev/null)" "$1" || silent+=("$place")
        done
        ((${#silent[@]})) || return 0
        asked=("${silent[@]}")
        sleep 0.5
    done
    printf '%s\n' "${silent[@]}"
}

# Lines that are in the first text and not in the second.
without() { grep -vxF -e "$2" <<<"$1"; }

# A service that answered nowhere before a change, since its workers are down, is no fault of it.
clients_are_served() {
    lost=$(without "$(silent_of "$1")" "${silent_before-}")
    [[ -z $lost ]]
}
