/*
 * The floor: the least that a FUSE server can do per request, in C on the raw device, to measure the others against.
 *
 * One directory, one file "data", every cache of the kernel off (time-outs 0, FOPEN_DIRECT_IO), so that each system call of
 * the client is one request here. N threads share the device. Nothing is allocated, locked or logged per request except a
 * counter per thread and opcode; the counts are printed at the end, so that the harness can check that a benchmark's
 * operations were the requests it believes they were.
 *
 * usage: floor_server TARGET FILE_SIZE THREADS      mounts itself with mount(2), prints "ready", serves until unmounted
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "pattern.h"

enum { FILE_NODE = 2, BUFFER = 16384, MAX_PAGES = 256, MAX_THREADS = 64, OPCODES = 64 };

static int device;
static uint64_t file_size;
static uint32_t pattern[PATTERN_WORDS * 2]; /* twice, so that every read up to PATTERN_BYTES is one piece */
static unsigned long counts[MAX_THREADS][OPCODES];

static void reply(uint64_t unique, int error, const void *body, size_t size)
{
    struct fuse_out_header header = {.len = sizeof header + size, .error = -error, .unique = unique};
    struct iovec pieces[2] = {{&header, sizeof header}, {(void *)body, size}};
    if (writev(device, pieces, size ? 2 : 1) < 0 && errno != ENOENT && errno != ENODEV) {
        perror("floor_server: reply");
        exit(1);
    }
}

static void fill_attr(struct fuse_attr *attr, uint64_t node)
{
    int directory = node == FUSE_ROOT_ID;
    attr->ino = node;
    attr->mode = directory ? S_IFDIR | 0755 : S_IFREG | 0644;
    attr->nlink = directory ? 2 : 1;
    attr->size = directory ? 0 : file_size;
    attr->blocks = (attr->size + 511) / 512;
    attr->blksize = 4096;
}

static void on_init(const struct fuse_in_header *in, const struct fuse_init_in *arg)
{
    struct fuse_init_out out = {
        .major = FUSE_KERNEL_VERSION,
        .minor = arg->minor < FUSE_KERNEL_MINOR_VERSION ? arg->minor : FUSE_KERNEL_MINOR_VERSION,
        .max_readahead = arg->max_readahead,
        .flags = arg->flags & (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES),
        .max_background = 64,
        .congestion_threshold = 48,
        .max_write = 4096,
        .time_gran = 1,
        .max_pages = MAX_PAGES,
    };
    reply(in->unique, 0, &out, sizeof out);
    puts("ready");
    fflush(stdout);
}

static void on_lookup(const struct fuse_in_header *in, const char *name)
{
    struct fuse_entry_out out = {.nodeid = FILE_NODE};
    if (in->nodeid != FUSE_ROOT_ID || strcmp(name, "data") != 0) {
        reply(in->unique, ENOENT, NULL, 0);
        return;
    }
    fill_attr(&out.attr, FILE_NODE);
    reply(in->unique, 0, &out, sizeof out);
}

static void on_getattr(const struct fuse_in_header *in)
{
    struct fuse_attr_out out = {0};
    fill_attr(&out.attr, in->nodeid);
    reply(in->unique, 0, &out, sizeof out);
}

static void on_open(const struct fuse_in_header *in)
{
    struct fuse_open_out out = {.open_flags = in->opcode == FUSE_OPEN ? FOPEN_DIRECT_IO : 0};
    reply(in->unique, 0, &out, sizeof out);
}

static void on_read(const struct fuse_in_header *in, const struct fuse_read_in *arg)
{
    uint64_t size = arg->offset >= file_size ? 0 : file_size - arg->offset;
    if (size > arg->size)
        size = arg->size;
    if (size > PATTERN_BYTES)
        size = PATTERN_BYTES;
    reply(in->unique, 0, (char *)pattern + arg->offset % PATTERN_BYTES, size);
}

static void on_readdir(const struct fuse_in_header *in, const struct fuse_read_in *arg)
{
    static const char *const names[] = {".", "..", "data"};
    char listing[256] = {0};
    size_t used = 0;
    for (uint64_t position = arg->offset; position < 3; position++) {
        struct fuse_dirent *entry = (struct fuse_dirent *)(listing + used);
        entry->ino = position == 2 ? FILE_NODE : FUSE_ROOT_ID;
        entry->off = position + 1;
        entry->namelen = strlen(names[position]);
        entry->type = position == 2 ? S_IFREG >> 12 : S_IFDIR >> 12;
        memcpy(entry->name, names[position], entry->namelen);
        used += FUSE_DIRENT_SIZE(entry);
    }
    reply(in->unique, 0, listing, used <= arg->size ? used : 0);
}

static void *serve(void *number)
{
    unsigned long *count = counts[(intptr_t)number];
    char *buffer = aligned_alloc(4096, BUFFER);
    if (!buffer)
        abort();
    for (;;) {
        ssize_t size = read(device, buffer, BUFFER);
        if (size < 0) {
            if (errno == ENOENT || errno == EINTR || errno == EAGAIN)
                continue;
            if (errno == ENODEV)
                return NULL;
            perror("floor_server: read");
            exit(1);
        }
        const struct fuse_in_header *in = (void *)buffer;
        const void *body = buffer + sizeof *in;
        if (in->opcode < OPCODES)
            count[in->opcode]++;
        switch (in->opcode) {
        case FUSE_INIT: on_init(in, body); break;
        case FUSE_LOOKUP: on_lookup(in, body); break;
        case FUSE_GETATTR: on_getattr(in); break;
        case FUSE_OPEN:
        case FUSE_OPENDIR: on_open(in); break;
        case FUSE_READ: on_read(in, body); break;
        case FUSE_READDIR: on_readdir(in, body); break;
        case FUSE_RELEASE:
        case FUSE_RELEASEDIR: reply(in->unique, 0, NULL, 0); break;
        case FUSE_FORGET:
        case FUSE_BATCH_FORGET:
        case FUSE_INTERRUPT: break; /* no reply */
        default: reply(in->unique, ENOSYS, NULL, 0);
        }
    }
}

static unsigned long total(int opcode, int threads)
{
    unsigned long sum = 0;
    for (int i = 0; i < threads; i++)
        sum += counts[i][opcode];
    return sum;
}

int main(int argc, char **argv)
{
    pthread_t threads[MAX_THREADS];
    char options[128];
    if (argc != 4) {
        fprintf(stderr, "usage: %s TARGET FILE_SIZE THREADS\n", argv[0]);
        return 2;
    }
    int number = atoi(argv[3]);
    if (number < 1 || number > MAX_THREADS) {
        fprintf(stderr, "floor_server: THREADS is 1 to %d, not %s\n", MAX_THREADS, argv[3]);
        return 2;
    }
    file_size = strtoull(argv[2], NULL, 10);
    fill_pattern(pattern);
    memcpy(pattern + PATTERN_WORDS, pattern, PATTERN_BYTES);
    device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (device < 0) {
        perror("floor_server: /dev/fuse");
        return 1;
    }
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=%d,group_id=%d", device, getuid(), getgid());
    if (mount("floor", argv[1], "fuse.floor", MS_NOSUID | MS_NODEV, options) < 0) {
        fprintf(stderr, "floor_server: mount on %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    for (intptr_t i = 1; i < number; i++)
        if (pthread_create(&threads[i], NULL, serve, (void *)i) != 0) {
            fprintf(stderr, "floor_server: no thread\n");
            return 1;
        }
    serve((void *)0);
    for (int i = 1; i < number; i++)
        pthread_join(threads[i], NULL);
    printf("{\"lookup\": %lu, \"getattr\": %lu, \"open\": %lu, \"read\": %lu, \"forget\": %lu}\n",
           total(FUSE_LOOKUP, number), total(FUSE_GETATTR, number), total(FUSE_OPEN, number), total(FUSE_READ, number),
           total(FUSE_FORGET, number) + total(FUSE_BATCH_FORGET, number));
    return 0;
}
