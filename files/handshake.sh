# handshake_status PROBE: the status line with which this host answers a WebSocket handshake. PROBE is
# `PORT` or `tls:PORT`, and behind it, each after a blank, other statuses by which a request without
# a certificate or credentials shows that it was understood. bash opens the socket itself, so that no
# client has to be installed; for TLS it takes curl. is_served STATUS PROBE: whether a worker answered
# so, or nginx as PROBE says; 401 is that of a worker which wants a token, and none was sent.
handshake_status() {
    local port=${1%% *} line='' pid
    local -a headers=('Connection: Upgrade' 'Upgrade: websocket' 'Sec-WebSocket-Version: 13'
        'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==')
    if [[ $port == tls:* ]]; then
        # Whether the certificate convinces clients is not asked here. What curl says of its work is
        # not buffered, as the answer itself is until the connection ends.
        exec 3< <(exec curl --silent --verbose --insecure --http1.1 --max-time 10 \
            "${headers[@]/#/-H}" "https://127.0.0.1:${port#tls:}/" 2>&1 >/dev/null)
        pid=$!
        while IFS= read -r -t 10 -u 3 line && [[ $line != '< HTTP/'* ]]; do line=''; done
        line=${line#< }
    else
        exec 3<>"/dev/tcp/127.0.0.1/$port" || return 1
        printf '%s\r\n' 'GET / HTTP/1.1' 'Host: localhost' "${headers[@]}" '' >&3
        IFS= read -r -t 10 -u 3 line
    fi
    exec 3>&-
    [[ -z ${pid-} ]] || kill "$pid" 2>/dev/null
    printf '%s\n' "${line%$'\r'}"
}

is_served() {
    local status
    for status in 101 401 $([[ $2 != *' '* ]] || printf '%s' "${2#* }"); do
        [[ $1 != *" $status "* ]] || return 0
    done
    return 1
}
