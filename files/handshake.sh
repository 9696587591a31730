# handshake_status PORT: the status line with which this host's PORT answers a WebSocket handshake.
# bash opens the socket itself, so that no client has to be installed. is_served STATUS: whether a
# worker answered so; 401 is that of a worker which wants a token, and none was sent.
handshake_status() {
    exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf '%s\r\n' 'GET / HTTP/1.1' 'Host: localhost' 'Connection: Upgrade' 'Upgrade: websocket' \
        'Sec-WebSocket-Version: 13' 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==' '' >&3
    IFS= read -r -t 10 -u 3 line
    exec 3>&-
    printf '%s\n' "${line%$'\r'}"
}

is_served() { [[ $1 == *' 101 '* || $1 == *' 401 '* ]]; }
