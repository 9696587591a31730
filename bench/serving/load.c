/* A load client that is never the bottleneck: closed loop over many WebSocket connections.
 *
 *   load HOST PORT CONNECTIONS SECONDS FRAME
 *
 * Each connection sends the message in the file FRAME, waits for the reply, sends it again. One
 * thread, no copies, no parsing beyond a frame's length; a reply with an "error" in it, or any
 * other frame than a whole binary message or a ping, ends the run. Prints one line of JSON.
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
#include <time.h>
#include <unistd.h>

#define MOST_LATENCIES 20000000
#define BUFFER 65536

struct connection {
    int fd;
    size_t have;
    uint64_t sent_at;
    unsigned char buffer[BUFFER];
};

static unsigned char *message;
static size_t message_length;
static uint32_t *latencies;
static size_t answered;

static void fail(const char *what) {
    fprintf(stderr, "load: %s (errno: %s)\n", what, strerror(errno));
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

/* The message as one masked binary frame; the same one every time. */
static void build(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path);
    fseek(file, 0, SEEK_END);
    long length = ftell(file);
    rewind(file);
    if (length < 126 || length > 60000) fail("FRAME must have 126 to 60000 bytes");
    const unsigned char mask[4] = {0x37, 0xfa, 0x21, 0x3d};
    message_length = (size_t)length + 8;
    message = malloc(message_length);
    const unsigned char head[4] = {0x82, 0x80 | 126, (unsigned char)(length >> 8), (unsigned char)length};
    memcpy(message, head, 4);
    memcpy(message + 4, mask, 4);
    if (fread(message + 8, 1, (size_t)length, file) != (size_t)length) fail(path);
    fclose(file);
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
    int length = snprintf(request, sizeof request,
        "GET / HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        "\r\n", host, port);
    send_all(it->fd, (unsigned char *)request, (size_t)length);
    it->have = 0;
    while (!memmem(it->buffer, it->have, "\r\n\r\n", 4)) {
        ssize_t got = recv(it->fd, it->buffer + it->have, 4096 - it->have, 0);
        if (got <= 0) fail("handshake");
        it->have += (size_t)got;
    }
    if (memcmp(it->buffer, "HTTP/1.1 101", 12)) fail("handshake refused");
    it->have = 0;
}

static void ask(struct connection *it) {
    it->sent_at = now_ns();
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

/* Takes what came; whether a reply is complete. */
static int take(struct connection *it) {
    ssize_t got = recv(it->fd, it->buffer + it->have, BUFFER - it->have, 0);
    if (got <= 0) fail("connection lost");
    it->have += (size_t)got;
    size_t head, length, done = 0;
    int complete = 0;
    while ((length = frame_length(it->buffer + done, it->have - done, &head))) {
        const unsigned char *frame = it->buffer + done;
        if (frame[0] == 0x82) {
            size_t looked_at = length < 512 ? length : 512;
            if (memmem(frame, looked_at, "\"error\"", 7)) {
                fprintf(stderr, "load: %.*s\n", (int)(looked_at - head), frame + head);
                exit(1);
            }
            complete = 1;
        } else if (frame[0] != 0x89) { /* a ping may wait for its pong until the run ends */
            fail("neither a binary message nor a ping");
        }
        done += length;
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

int main(int count, char **arguments) {
    if (count != 6) fail("usage: load HOST PORT CONNECTIONS SECONDS FRAME");
    int connections = atoi(arguments[3]);
    double seconds = atof(arguments[4]);
    build(arguments[5]);
    latencies = malloc(sizeof *latencies * MOST_LATENCIES);
    struct connection *all = calloc((size_t)connections, sizeof *all);
    int poll = epoll_create1(0);
    if (!latencies || !all || poll < 0) fail("start");
    for (int i = 0; i < connections; i++) {
        open_connection(&all[i], arguments[1], atoi(arguments[2]));
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &all[i]};
        if (epoll_ctl(poll, EPOLL_CTL_ADD, all[i].fd, &event)) fail("epoll");
    }
    uint64_t started = now_ns(), end = started + (uint64_t)(seconds * 1e9);
    for (int i = 0; i < connections; i++) ask(&all[i]);
    struct epoll_event events[256];
    uint64_t at = started;
    while (at < end) {
        int ready = epoll_wait(poll, events, 256, 10000);
        if (ready <= 0) fail("no reply for 10 s");
        for (int i = 0; i < ready; i++) {
            struct connection *it = events[i].data.ptr;
            if (!take(it)) continue;
            at = now_ns();
            if (answered < MOST_LATENCIES) latencies[answered++] = (uint32_t)(at - it->sent_at);
            ask(it);
        }
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
        + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    double took = (double)(at - started) / 1e9;
    qsort(latencies, answered, sizeof *latencies, ascending);
    printf("{\"requests\": %zu, \"seconds\": %.6f, \"cpu_s\": %.6f, "
        "\"p50_us\": %.1f, \"p99_us\": %.1f}\n",
        answered, took, cpu, percentile_us(0.5), percentile_us(0.99));
    return 0;
}
