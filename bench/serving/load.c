/* A load client that is never the bottleneck: many connections, each sends, waits, sends again.
 *
 *   load ws|http HOST PORT CONNECTIONS SECONDS FILE [RATE]
 *
 * ws: FILE is the payload of one binary WebSocket message. http: FILE is one whole request,
 * header and body, of a connection that stays open. With RATE (requests a second of all
 * connections together) they are sent at fixed times instead, and a latency counts from that time,
 * so that a server that stalls does not hide it. One thread, no parsing beyond lengths; a reply
 * with an "error" in it, an HTTP status other than 200, or any other frame than a whole binary
 * message or a ping, ends the run. Prints one line of JSON.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MOST_LATENCIES 20000000
#define BUFFER 65536

struct connection {
    int fd;
    int busy;
    size_t have;
    uint64_t sent_at;
    unsigned char buffer[BUFFER];
};

static unsigned char *message;
static size_t message_length;
static uint32_t *latencies;
static size_t answered;
static int is_http;

static void fail(const char *what) {
    fprintf(stderr, "load: %s (errno: %s)\n", what, strerror(errno));
    exit(1);
}

static void fail_with(const unsigned char *reply, size_t length) {
    fprintf(stderr, "load: %.*s\n", (int)(length < 512 ? length : 512), reply);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

static void send_all(int fd, const unsigned char *bytes, size_t length) {
    while (length) {
        ssize_t done = send(fd, bytes, length, MSG_NOSIGNAL);
        if (done < 0) fail("send");
        bytes += done;
        length -= (size_t)done;
    }
}

/* What is sent every time: the file, for ws as one masked binary frame. */
static void build(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path);
    fseek(file, 0, SEEK_END);
    long length = ftell(file);
    rewind(file);
    if (length < 126 || length > 60000) fail("FILE must have 126 to 60000 bytes");
    const unsigned char mask[4] = {0x37, 0xfa, 0x21, 0x3d};
    const unsigned char head[4] = {0x82, 0x80 | 126, (unsigned char)(length >> 8), (unsigned char)length};
    size_t before = is_http ? 0 : 8;
    message_length = (size_t)length + before;
    message = malloc(message_length);
    if (fread(message + before, 1, (size_t)length, file) != (size_t)length) fail(path);
    fclose(file);
    if (is_http) return;
    memcpy(message, head, 4);
    memcpy(message + 4, mask, 4);
    for (long i = 0; i < length; i++) message[8 + i] ^= mask[i & 3];
}

static void open_connection(struct connection *it, const char *host, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = 1;
    char request[512];
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) fail("HOST must be an IPv4 address");
    it->fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(it->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(it->fd, (struct sockaddr *)&address, sizeof address)) fail("connect");
    it->have = 0;
    if (is_http) return;
    int length = snprintf(request, sizeof request,
        "GET / HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        "\r\n", host, port);
    send_all(it->fd, (unsigned char *)request, (size_t)length);
    while (!memmem(it->buffer, it->have, "\r\n\r\n", 4)) {
        ssize_t got = recv(it->fd, it->buffer + it->have, 4096 - it->have, 0);
        if (got <= 0) fail("handshake");
        it->have += (size_t)got;
    }
    if (memcmp(it->buffer, "HTTP/1.1 101", 12)) fail_with(it->buffer, it->have);
    it->have = 0;
}

static void ask(struct connection *it, uint64_t at) {
    it->sent_at = at;
    it->busy = 1;
    send_all(it->fd, message, message_length);
}

/* The length of the frame at the start of `bytes`, 0 if it is not all there. */
static size_t frame_length(const unsigned char *bytes, size_t have, size_t *head) {
    if (have < 2) return 0;
    *head = 2;
    size_t length = bytes[1] & 127;
    if (length == 127) fail("a reply of 64 KiB or more");
    if (length == 126) {
        *head = 4;
        if (have < 4) return 0;
        length = (size_t)bytes[2] << 8 | bytes[3];
    }
    return have < *head + length ? 0 : *head + length;
}

/* The length of the response at the start of `bytes`, 0 if it is not all there. */
static size_t response_length(const unsigned char *bytes, size_t have) {
    const char *name = "content-length:";
    const unsigned char *end = memmem(bytes, have, "\r\n\r\n", 4);
    if (!end) return 0;
    if (have < 12 || memcmp(bytes, "HTTP/1.1 200", 12)) fail_with(bytes, have);
    const unsigned char *line = bytes;
    while (line < end) {
        if (!strncasecmp((const char *)line, name, strlen(name))) {
            size_t total = (size_t)(end - bytes) + 4
                + strtoul((const char *)line + strlen(name), NULL, 10);
            if (total > BUFFER) fail("a response of 64 KiB or more");
            return have < total ? 0 : total;
        }
        line = (const unsigned char *)memmem(line, (size_t)(end - line) + 2, "\r\n", 2) + 2;
    }
    fail("a response without Content-Length");
    return 0;
}

/* Takes the frames that are there; whether one of them is a reply, and how much was taken. */
static int take_frames(struct connection *it, size_t *done) {
    size_t head, length;
    int complete = 0;
    while ((length = frame_length(it->buffer + *done, it->have - *done, &head))) {
        const unsigned char *frame = it->buffer + *done;
        if (frame[0] == 0x82) {
            size_t looked_at = length < 512 ? length : 512;
            if (memmem(frame, looked_at, "\"error\"", 7)) fail_with(frame + head, looked_at - head);
            complete = 1;
        } else if (frame[0] != 0x89) { /* a ping may wait for its pong until the run ends */
            fail("neither a binary message nor a ping");
        }
        *done += length;
    }
    return complete;
}

/* Takes what came; whether a reply is complete. */
static int take(struct connection *it) {
    ssize_t got = recv(it->fd, it->buffer + it->have, BUFFER - it->have, 0);
    if (got <= 0) fail("connection lost");
    it->have += (size_t)got;
    size_t done = 0;
    int complete;
    if (is_http) {
        done = response_length(it->buffer, it->have);
        complete = done > 0;
    } else {
        complete = take_frames(it, &done);
    }
    memmove(it->buffer, it->buffer + done, it->have - done);
    it->have -= done;
    return complete;
}

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static double percentile_us(double share) {
    return answered ? latencies[(size_t)(share * (double)(answered - 1))] / 1e3 : 0;
}

static int ticks(double rate) {
    int timer = timerfd_create(CLOCK_MONOTONIC, 0);
    long interval = (long)(1e9 / rate);
    struct timespec every = {interval / 1000000000, interval % 1000000000};
    struct itimerspec schedule = {.it_interval = every, .it_value = every};
    if (timer < 0 || timerfd_settime(timer, 0, &schedule, NULL)) fail("timer");
    return timer;
}

static double used_cpu(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
        + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

int main(int count, char **arguments) {
    if (count != 7 && count != 8)
        fail("usage: load ws|http HOST PORT CONNECTIONS SECONDS FILE [RATE]");
    is_http = !strcmp(arguments[1], "http");
    int connections = atoi(arguments[4]);
    double seconds = atof(arguments[5]), rate = count == 8 ? atof(arguments[7]) : 0;
    build(arguments[6]);
    latencies = malloc(sizeof *latencies * MOST_LATENCIES);
    struct connection *all = calloc((size_t)connections, sizeof *all);
    int poll = epoll_create1(0), timer = -1;
    if (!latencies || !all || poll < 0) fail("start");
    for (int i = 0; i < connections; i++) {
        open_connection(&all[i], arguments[2], atoi(arguments[3]));
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &all[i]};
        if (epoll_ctl(poll, EPOLL_CTL_ADD, all[i].fd, &event)) fail("epoll");
    }
    uint64_t started = now_ns(), end = started + (uint64_t)(seconds * 1e9), sent = 0;
    if (rate > 0) {
        timer = ticks(rate);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
        if (epoll_ctl(poll, EPOLL_CTL_ADD, timer, &event)) fail("epoll");
    }
    for (int i = 0; timer < 0 && i < connections; i++) ask(&all[i], started);
    struct epoll_event events[256];
    uint64_t at = started;
    double before = 0;
    int warming = timer < 0;
    while (at < end) {
        // Each has been answered once: from here on, none is idle for being new.
        if (warming && answered >= (size_t)connections) {
            warming = 0, answered = 0, before = used_cpu();
            started = at, end = started + (uint64_t)(seconds * 1e9);
        }
        int ready = epoll_wait(poll, events, 256, 10000);
        if (ready <= 0) fail("no reply for 10 s");
        for (int i = 0; i < ready; i++) {
            struct connection *it = events[i].data.ptr;
            if (!it) {
                uint64_t due;
                if (read(timer, &due, sizeof due) != sizeof due) fail("timer");
                for (; due; due--) {
                    it = &all[sent++ % (uint64_t)connections];
                    if (it->busy) fail("RATE is more than so many connections get answered");
                    ask(it, started + (uint64_t)((double)sent * 1e9 / rate));
                }
                continue;
            }
            if (!take(it)) continue;
            it->busy = 0;
            at = now_ns();
            if (answered < MOST_LATENCIES) latencies[answered++] = (uint32_t)(at - it->sent_at);
            if (timer < 0) ask(it, at);
        }
    }
    double cpu = used_cpu() - before;
    double took = (double)(at - started) / 1e9;
    qsort(latencies, answered, sizeof *latencies, ascending);
    printf("{\"requests\": %zu, \"seconds\": %.6f, \"cpu_s\": %.6f, "
        "\"p50_us\": %.1f, \"p99_us\": %.1f}\n",
        answered, took, cpu, percentile_us(0.5), percentile_us(0.99));
    return 0;
}
