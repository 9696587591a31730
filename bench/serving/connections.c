/* Many WebSocket connections from one thread, more than one address has ports for.
 *
 *   connections hold HOST PORT COUNT FILE
 *   connections churn HOST PORT COUNT FILE
 *
 * hold opens COUNT connections, prints "open", and answers their pings. For each line on stdin, every
 * connection sends the message in FILE once and waits for the reply, some at a time; "answered"
 * follows when all have it. Ends with stdin.
 * churn opens COUNT connections after each other, some at a time; each sends the message once, and
 * after its reply closes: by turns with a closing handshake, and without a word.
 *
 * The clients' addresses are 127.0.0.2 and up: HOST must be on the loopback interface.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define AT_A_TIME 64
#define ADDRESSES 16
#define BUFFER 8192
#define STDIN UINT32_MAX

enum state { CONNECTING, HANDSHAKE, IDLE, WAITING, CLOSING, DONE };

struct connection {
    int fd;
    enum state state;
    size_t have;
    unsigned char buffer[BUFFER];
};

static struct connection *all;
static uint32_t count, started, asked, finished;
static int poll_fd, is_churn;
static struct sockaddr_in server;
static unsigned char *message;
static size_t message_length;

static void fail(const char *what) {
    fprintf(stderr, "connections: %s (errno: %s)\n", what, strerror(errno));
    exit(1);
}

static void fail_with(const unsigned char *reply, size_t length) {
    fprintf(stderr, "connections: %.*s\n", (int)(length < 512 ? length : 512), reply);
    exit(1);
}

/* Small enough for any socket's buffer: never waits. */
static void send_all(int fd, const void *bytes, size_t length) {
    if (send(fd, bytes, length, MSG_NOSIGNAL) != (ssize_t)length) fail("send");
}

static void build(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path);
    fseek(file, 0, SEEK_END);
    long length = ftell(file);
    rewind(file);
    if (length < 126 || length > 60000) fail("FILE must have 126 to 60000 bytes");
    const unsigned char head[8] = {0x82, 0x80 | 126, (unsigned char)(length >> 8), (unsigned char)length};
    message_length = (size_t)length + 8; /* a mask of zeros: the payload stays as it is */
    message = malloc(message_length);
    memcpy(message, head, 8);
    if (fread(message + 8, 1, (size_t)length, file) != (size_t)length) fail(path);
    fclose(file);
}

static void start(uint32_t number) {
    struct connection *it = &all[number];
    struct sockaddr_in own = {.sin_family = AF_INET};
    int one = 1;
    own.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + number % ADDRESSES);
    it->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (it->fd < 0) fail("socket");
    setsockopt(it->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(it->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (bind(it->fd, (struct sockaddr *)&own, sizeof own)) fail("bind");
    if (connect(it->fd, (struct sockaddr *)&server, sizeof server) && errno != EINPROGRESS)
        fail("connect");
    it->state = CONNECTING;
    struct epoll_event event = {.events = EPOLLOUT, .data.u32 = number};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, it->fd, &event)) fail("epoll");
}

static void connected(uint32_t number) {
    struct connection *it = &all[number];
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(it->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if ((errno = error)) fail("connect");
    static const char request[] =
        "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
    send_all(it->fd, request, sizeof request - 1);
    it->state = HANDSHAKE;
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = number};
    if (epoll_ctl(poll_fd, EPOLL_CTL_MOD, it->fd, &event)) fail("epoll");
}

static void ask(uint32_t number) {
    all[number].state = WAITING;
    send_all(all[number].fd, message, message_length);
}

static void over(uint32_t number) {
    close(all[number].fd);
    all[number].state = DONE;
    finished++;
    if (started < count) start(started++);
}

static void opened(uint32_t number) {
    all[number].state = IDLE;
    if (is_churn) {
        ask(number);
    } else if (++finished == count) {
        puts("open");
    } else if (started < count) {
        start(started++);
    }
}

static void answered(uint32_t number) {
    all[number].state = IDLE;
    if (!is_churn) {
        if (++finished == count) puts("answered");
        if (asked < count) ask(asked++);
    } else if (number % 2) {
        over(number);
    } else {
        static const unsigned char normal[8] = {0x88, 0x82, 0, 0, 0, 0, 1000 >> 8, 1000 & 255};
        all[number].state = CLOSING;
        send_all(all[number].fd, normal, sizeof normal);
    }
}

/* One frame of `length` bytes of payload behind `head`. */
static void frame(uint32_t number, const unsigned char *bytes, size_t head, size_t length) {
    struct connection *it = &all[number];
    if (bytes[0] == 0x89 && length < 126) {
        unsigned char pong[6 + 125] = {0x8a, (unsigned char)(0x80 | length)};
        memcpy(pong + 6, bytes + head, length);
        send_all(it->fd, pong, 6 + length);
    } else if (bytes[0] == 0x82 && it->state == WAITING) {
        size_t looked_at = length < 512 ? length : 512;
        if (memmem(bytes + head, looked_at, "\"error\"", 7)) fail_with(bytes + head, looked_at);
        answered(number);
    } else if (bytes[0] != 0x88 || it->state != CLOSING) {
        fail("neither the reply, nor a ping, nor the answer to a close");
    }
}

static void take(uint32_t number) {
    struct connection *it = &all[number];
    ssize_t got = recv(it->fd, it->buffer + it->have, BUFFER - it->have, 0);
    if (got == 0 && it->state == CLOSING) {
        over(number);
        return;
    }
    if (got <= 0) fail("connection lost");
    it->have += (size_t)got;
    size_t at = 0;
    if (it->state == HANDSHAKE) {
        unsigned char *end = memmem(it->buffer, it->have, "\r\n\r\n", 4);
        if (!end) return;
        if (memcmp(it->buffer, "HTTP/1.1 101", 12)) fail_with(it->buffer, it->have);
        at = (size_t)(end - it->buffer) + 4;
        opened(number);
    }
    while (it->state != DONE && it->have - at >= 4) {
        const unsigned char *bytes = it->buffer + at;
        size_t head = 2, length = bytes[1] & 127;
        if (length == 127) fail("a reply of 64 KiB or more");
        if (length == 126) {
            head = 4;
            length = (size_t)bytes[2] << 8 | bytes[3];
        }
        if (head + length > BUFFER) fail("a reply of 8 KiB or more");
        if (it->have - at < head + length) break;
        at += head + length;
        frame(number, bytes, head, length);
    }
    memmove(it->buffer, it->buffer + at, it->have - at);
    it->have -= at;
}

/* A line, upon which every connection asks once; the end of stdin ends all. */
static void told(void) {
    char line[256];
    if (read(0, line, sizeof line) <= 0) exit(0);
    if (finished != count) fail("told to ask before all were open or answered");
    finished = asked = 0;
    while (asked < count && asked < AT_A_TIME) ask(asked++);
}

int main(int arguments, char **argument) {
    if (arguments != 6) fail("usage: connections hold|churn HOST PORT COUNT FILE");
    is_churn = !strcmp(argument[1], "churn");
    count = (uint32_t)atoi(argument[4]);
    server.sin_family = AF_INET;
    server.sin_port = htons((uint16_t)atoi(argument[3]));
    if (inet_pton(AF_INET, argument[2], &server.sin_addr) != 1) fail("HOST must be an IPv4 address");
    build(argument[5]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    all = calloc(count, sizeof *all);
    poll_fd = epoll_create1(0);
    if (!all || poll_fd < 0) fail("start");
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = STDIN};
    if (!is_churn && epoll_ctl(poll_fd, EPOLL_CTL_ADD, 0, &event)) fail("epoll: stdin");
    while (started < count && started < AT_A_TIME) start(started++);
    struct epoll_event events[256];
    while (!is_churn || finished < count) {
        int ready = epoll_wait(poll_fd, events, 256, 60000);
        if (ready <= 0) fail("nothing happened for a minute");
        for (int i = 0; i < ready; i++) {
            uint32_t number = events[i].data.u32;
            if (number == STDIN) {
                told();
            } else if (all[number].state == CONNECTING) {
                connected(number);
            } else if (all[number].state != DONE) {
                take(number);
            }
        }
    }
    puts("closed");
    return 0;
}
