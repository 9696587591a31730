# handshake_status PORT: the status line with which this host's PORT answers a WebSocket handshake.
# bash opens the socket itself, so that no client has to be installed.
handshake_status() {
    exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf '%s\r\n' 'GET / HTTP/1.1' 'Host: localhost' 'Connection: Upgrade' 'Upgrade: websocket' \
        'Sec-WebSocket-Version: 13' 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==' '' >&3
    IFS= read -r -t 10 -u 3 line
    exec 3>&-
    printf '%s\n' "${line%$'\r'}"
}
