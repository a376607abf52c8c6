/*
 * The client side of the benchmarks, in C so that its own cost does not hide differences between servers.
 *
 * Every command prints one line of JSON with the time of the measured part (CLOCK_MONOTONIC, start-up of the process and
 * opening of the files excluded where said) and figures that must be equal for every server of the same content.
 *
 *   client floor DIR OPERATION COUNT THREADS    lookup | getattr | read4k | read1m of DIR/data, COUNT times in each thread
 *   client verify DIR SIZE                      content of DIR/data against the pattern, in 4 KiB and in 1 MiB reads
 *   client walk DIR                             opendir, readdir and fstatat of everything below DIR
 *   client read DIR LIST THREADS                whole files: path per line in LIST, thread i reads lines i, i+THREADS, ...
 *   client random DIR LIST THREADS              4 KiB reads: "OFFSET PATH" per line in LIST; files are opened before
 *   client stat DIR LIST PASSES                 fstatat of path per line in LIST, the whole list PASSES times
 *   client create DIR COUNT                     creates, writes and closes COUNT small files
 *   client unlink DIR COUNT                     removes them
 *   client write PATH SIZE                      a new file of SIZE bytes in pieces of 1 MiB, with fsync and close
 *   client sink                                 counts what comes on standard input
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"

enum { MAX_THREADS = 64, PIECE = 128 << 10, CHUNK = 1 << 20 };

static void die(const char *format, ...)
{
    int error = errno;
    va_list arguments;
    va_start(arguments, format);
    fputs("client: ", stderr);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, ": %s\n", strerror(error));
    exit(1);
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + time.tv_nsec;
}

static void *aligned(size_t size)
{
    void *memory = aligned_alloc(4096, size);
    if (!memory)
        die("%zu bytes", size);
    memset(memory, 0, size);
    return memory;
}

/* ---- threads that start together ---- */

struct job {
    pthread_t thread;
    pthread_barrier_t *start;
    int index, threads;
    uint64_t bytes, check;
};

static void (*job_setup)(struct job *);
static void (*job_body)(struct job *);

static void *job_main(void *argument)
{
    struct job *job = argument;
    if (job_setup)
        job_setup(job);
    pthread_barrier_wait(job->start);
    job_body(job);
    return NULL;
}

/* Runs the body in THREADS threads at once: time from the moment all are set up to the end of the last one. */
static uint64_t run_jobs(int threads, uint64_t *bytes, uint64_t *check)
{
    static struct job jobs[MAX_THREADS];
    pthread_barrier_t start;
    if (threads < 1 || threads > MAX_THREADS) {
        errno = EINVAL;
        die("%d threads", threads);
    }
    pthread_barrier_init(&start, NULL, threads + 1);
    for (int i = 0; i < threads; i++) {
        jobs[i] = (struct job){.start = &start, .index = i, .threads = threads};
        if ((errno = pthread_create(&jobs[i].thread, NULL, job_main, &jobs[i])) != 0)
            die("thread");
    }
    /* The clock starts before the barrier opens: the last thread to arrive may run at once and finish before we do. */
    uint64_t began = now();
    pthread_barrier_wait(&start);
    for (int i = 0; i < threads; i++) {
        pthread_join(jobs[i].thread, NULL);
        *bytes += jobs[i].bytes;
        *check += jobs[i].check;
    }
    return now() - began;
}

/* ---- floor ---- */

static const char *operation;
static long operations;
static int directory;
static uint64_t data_size;

static void floor_body(struct job *job)
{
    static __thread struct stat attributes;
    int file = openat(directory, "data", O_RDONLY | O_CLOEXEC);
    size_t size = strcmp(operation, "read1m") == 0 ? 1 << 20 : 4096;
    char *buffer = aligned(size);
    if (file < 0)
        die("data");
    if (strcmp(operation, "lookup") == 0) {
        /* The open file keeps the name in the dentry cache, so each of these is one LOOKUP (a revalidation) and no FORGET.
           O_PATH, because stat(2) would be a LOOKUP and a GETATTR. */
        for (long i = 0; i < operations; i++) {
            int found = openat(directory, "data", O_PATH | O_CLOEXEC);
            if (found < 0)
                die("lookup");
            close(found);
        }
    } else if (strcmp(operation, "getattr") == 0) {
        for (long i = 0; i < operations; i++)
            if (fstat(file, &attributes) < 0)
                die("getattr");
        job->bytes = attributes.st_size;
    } else {
        uint64_t blocks = data_size / size, block = job->index * 7919u % blocks;
        for (long i = 0; i < operations; i++) {
            if (pread(file, buffer, size, block * size) != (ssize_t)size)
                die("read at block %llu of %zu", (unsigned long long)block, size);
            job->bytes += size;
            job->check += *(uint32_t *)buffer;
            if (++block == blocks)
                block = 0;
        }
    }
    close(file);
    free(buffer);
}

static int command_floor(char **argv)
{
    uint64_t bytes = 0, check = 0;
    struct stat attributes;
    operation = argv[1];
    operations = atol(argv[2]);
    directory = open(argv[0], O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0 || fstatat(directory, "data", &attributes, 0) < 0)
        die("%s", argv[0]);
    data_size = attributes.st_size;
    job_body = floor_body;
    uint64_t time = run_jobs(atoi(argv[3]), &bytes, &check);
    printf("{\"ns\": %llu, \"bytes\": %llu, \"check\": %llu}\n", (unsigned long long)time, (unsigned long long)bytes,
           (unsigned long long)check);
    return 0;
}

static int command_verify(char **argv)
{
    static uint32_t pattern[PATTERN_WORDS];
    char path[4096];
    uint64_t expected = strtoull(argv[1], NULL, 10);
    char *buffer = aligned(CHUNK);
    snprintf(path, sizeof path, "%s/data", argv[0]);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat attributes;
    if (file < 0 || fstat(file, &attributes) < 0)
        die("%s", path);
    fill_pattern(pattern);
    for (size_t size = 4096; size <= CHUNK; size = size == 4096 ? CHUNK : CHUNK + 1)
        for (uint64_t at = 0; at < expected && (size == CHUNK || at < 4 * CHUNK); at += size) {
            ssize_t got = pread(file, buffer, size, at);
            if (got != (ssize_t)size || memcmp(buffer, (char *)pattern + at % PATTERN_BYTES, size) != 0) {
                fprintf(stderr, "client: %s: wrong content, %zd of %zu bytes at %llu\n", path, got, size,
                        (unsigned long long)at);
                return 1;
            }
        }
    if ((uint64_t)attributes.st_size != expected || pread(file, buffer, 4096, expected) != 0) {
        fprintf(stderr, "client: %s: does not end at %llu\n", path, (unsigned long long)expected);
        return 1;
    }
    puts("{\"verified\": true}");
    return 0;
}

/* ---- walk ---- */

struct tally {
    unsigned long entries, directories;
    uint64_t bytes, digest;
};

static uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
}

/* Path, type, permissions, size, owner and time of every entry; the sum does not depend on the order of a listing. */
static void walk(int parent, const char *name, uint64_t path, struct tally *tally)
{
    int descriptor = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *listing = descriptor < 0 ? NULL : fdopendir(descriptor);
    struct dirent *entry;
    struct stat attributes;
    if (!listing)
        die("directory %s", name);
    while (errno = 0, (entry = readdir(listing))) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (fstatat(descriptor, entry->d_name, &attributes, AT_SYMLINK_NOFOLLOW) < 0)
            die("stat of %s", entry->d_name);
        uint64_t hash = path;
        for (const char *letter = entry->d_name; *letter; letter++)
            hash = mix(hash, (unsigned char)*letter);
        hash = mix(hash, '/');
        uint64_t size = S_ISDIR(attributes.st_mode) ? 0 : attributes.st_size; /* a directory's size means nothing */
        uint64_t owner = (uint64_t)attributes.st_uid << 32 | attributes.st_gid;
        tally->digest += mix(mix(mix(mix(hash, attributes.st_mode), size), owner), attributes.st_mtime);
        tally->entries++;
        tally->bytes += size;
        if (S_ISDIR(attributes.st_mode)) {
            tally->directories++;
            walk(descriptor, entry->d_name, hash, tally);
        }
    }
    if (errno)
        die("readdir of %s", name);
    closedir(listing);
}

static int command_walk(char **argv)
{
    struct tally tally = {0};
    uint64_t began = now();
    walk(AT_FDCWD, argv[0], 0, &tally);
    uint64_t time = now() - began;
    printf("{\"ns\": %llu, \"entries\": %lu, \"directories\": %lu, \"bytes\": %llu, \"digest\": \"%016llx\"}\n",
           (unsigned long long)time, tally.entries, tally.directories, (unsigned long long)tally.bytes,
           (unsigned long long)tally.digest);
    return 0;
}

/* ---- lists of files ---- */

struct line {
    uint64_t offset;
    char *path;
    int file;
};

static struct line *lines;
static size_t line_count;

static void read_list(const char *name, int with_offsets)
{
    FILE *list = fopen(name, "r");
    char *text = NULL;
    size_t room = 0, capacity = 0;
    ssize_t length;
    if (!list)
        die("%s", name);
    while ((length = getline(&text, &room, list)) > 0) {
        char *path = text;
        if (line_count == capacity && !(lines = realloc(lines, (capacity = capacity * 2 + 256) * sizeof *lines)))
            die("list");
        text[strcspn(text, "\n")] = 0;
        lines[line_count] = (struct line){.file = -1};
        if (with_offsets)
            lines[line_count].offset = strtoull(text, &path, 10), path++;
        lines[line_count++].path = strdup(path);
    }
    free(text);
    fclose(list);
    if (line_count == 0) {
        errno = ENODATA;
        die("%s", name);
    }
}

/* A sum that the compiler makes vector code of: reading costs the client next to nothing, and a wrong piece shows. */
static uint64_t sum_words(const char *data, size_t size)
{
    uint64_t sum = 0, word;
    size_t at = 0;
    for (; at + 8 <= size; at += 8) {
        memcpy(&word, data + at, 8);
        sum += word;
    }
    for (; at < size; at++)
        sum += (unsigned char)data[at];
    return sum;
}

static void read_body(struct job *job)
{
    char *buffer = aligned(CHUNK);
    for (size_t i = job->index; i < line_count; i += job->threads) {
        int file = openat(directory, lines[i].path, O_RDONLY | O_CLOEXEC);
        uint64_t at = 0, piece = 0;
        if (file < 0)
            die("%s", lines[i].path);
        for (;;) {
            size_t have = 0;
            ssize_t got;
            while (have < CHUNK && (got = read(file, buffer + have, CHUNK - have)) > 0)
                have += got;
            if (got < 0)
                die("%s", lines[i].path);
            for (size_t from = 0; from < have; from += PIECE)
                job->check += sum_words(buffer + from, have - from < PIECE ? have - from : PIECE) * (i + 1) * (2 * ++piece + 1);
            at += have;
            if (have < CHUNK)
                break;
        }
        job->bytes += at;
        close(file);
    }
    free(buffer);
}

static void random_body(struct job *job)
{
    char *buffer = aligned(4096);
    for (size_t i = job->index; i < line_count; i += job->threads) {
        ssize_t got = pread(lines[i].file, buffer, 4096, lines[i].offset);
        if (got <= 0)
            die("%s at %llu", lines[i].path, (unsigned long long)lines[i].offset);
        job->bytes += got;
        job->check += sum_words(buffer, got) * (i + 1);
    }
    free(buffer);
}

static int command_list(char **argv, int random)
{
    uint64_t bytes = 0, check = 0;
    directory = open(argv[0], O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0)
        die("%s", argv[0]);
    read_list(argv[1], random);
    if (random)
        for (size_t i = 0; i < line_count; i++) {
            /* Lines of one file follow one another nowhere; one descriptor per path is enough. */
            for (size_t other = 0; other < i && lines[i].file < 0; other++)
                if (strcmp(lines[other].path, lines[i].path) == 0)
                    lines[i].file = lines[other].file;
            if (lines[i].file < 0 && (lines[i].file = openat(directory, lines[i].path, O_RDONLY | O_CLOEXEC)) < 0)
                die("%s", lines[i].path);
        }
    job_body = random ? random_body : read_body;
    uint64_t time = run_jobs(atoi(argv[2]), &bytes, &check);
    printf("{\"ns\": %llu, \"bytes\": %llu, \"check\": \"%016llx\"}\n", (unsigned long long)time, (unsigned long long)bytes,
           (unsigned long long)check);
    return 0;
}

/* ---- names and new files ---- */

static int command_stat(char **argv)
{
    uint64_t digest = 0;
    struct stat attributes;
    long passes = atol(argv[2]);
    directory = open(argv[0], O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0)
        die("%s", argv[0]);
    read_list(argv[1], 0);
    uint64_t began = now();
    for (long pass = 0; pass < passes; pass++)
        for (size_t i = 0; i < line_count; i++) {
            if (fstatat(directory, lines[i].path, &attributes, AT_SYMLINK_NOFOLLOW) < 0)
                die("stat of %s", lines[i].path);
            digest += mix(mix(mix(i, attributes.st_mode), attributes.st_size), attributes.st_mtime);
        }
    uint64_t time = now() - began;
    printf("{\"ns\": %llu, \"stats\": %llu, \"digest\": \"%016llx\"}\n", (unsigned long long)time,
           (unsigned long long)passes * line_count, (unsigned long long)digest);
    return 0;
}

static void write_all(int file, const char *data, size_t size, const char *name)
{
    while (size) {
        ssize_t put = write(file, data, size);
        if (put <= 0)
            die("write to %s", name);
        data += put;
        size -= put;
    }
}

/* Every 4 KiB begin with a word that is found nowhere else, so a piece that is lost, moved or doubled shows. */
static void stamp(char *buffer, size_t size, uint64_t first)
{
    for (size_t at = 0; at < size; at += 4096) {
        uint64_t word = mix(first, at / 4096 + 1);
        memcpy(buffer + at, &word, sizeof word);
    }
}

static int command_small(char **argv, int making)
{
    long count = atol(argv[1]);
    char name[32], *buffer = aligned(4096);
    uint64_t bytes = 0;
    directory = open(argv[0], O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0)
        die("%s", argv[0]);
    uint64_t began = now();
    for (long i = 0; i < count; i++) {
        snprintf(name, sizeof name, "small%05ld", i);
        if (!making) {
            if (unlinkat(directory, name, 0) < 0)
                die("unlink of %s", name);
            continue;
        }
        int file = openat(directory, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
        if (file < 0)
            die("%s", name);
        size_t size = 512 + i * 7919u % 3584;
        stamp(buffer, 4096, i);
        write_all(file, buffer, size, name);
        if (close(file) < 0)
            die("close of %s", name);
        bytes += size;
    }
    uint64_t time = now() - began;
    printf("{\"ns\": %llu, \"files\": %ld, \"bytes\": %llu}\n", (unsigned long long)time, count,
           (unsigned long long)bytes);
    return 0;
}

static int command_write(char **argv)
{
    uint64_t size = strtoull(argv[1], NULL, 10);
    char *buffer = aligned(CHUNK);
    uint64_t began = now();
    int file = open(argv[0], O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (file < 0)
        die("%s", argv[0]);
    for (uint64_t at = 0; at < size; at += CHUNK) {
        stamp(buffer, CHUNK, at);
        write_all(file, buffer, size - at < CHUNK ? size - at : CHUNK, argv[0]);
    }
    /* What the kernel has kept back until now belongs to the time, too. */
    if (fsync(file) < 0 || close(file) < 0)
        die("fsync or close of %s", argv[0]);
    uint64_t time = now() - began;
    printf("{\"ns\": %llu, \"bytes\": %llu}\n", (unsigned long long)time, (unsigned long long)size);
    return 0;
}

static int command_sink(void)
{
    uint64_t total = 0;
    ssize_t got;
    char *buffer = aligned(CHUNK);
    while ((got = read(STDIN_FILENO, buffer, CHUNK)) > 0)
        total += got;
    if (got < 0)
        die("standard input");
    printf("{\"bytes\": %llu}\n", (unsigned long long)total);
    return 0;
}

int main(int argc, char **argv)
{
    const char *command = argc > 1 ? argv[1] : "";
    if (strcmp(command, "floor") == 0 && argc == 6)
        return command_floor(argv + 2);
    if (strcmp(command, "verify") == 0 && argc == 4)
        return command_verify(argv + 2);
    if (strcmp(command, "walk") == 0 && argc == 3)
        return command_walk(argv + 2);
    if (strcmp(command, "read") == 0 && argc == 5)
        return command_list(argv + 2, 0);
    if (strcmp(command, "random") == 0 && argc == 5)
        return command_list(argv + 2, 1);
    if (strcmp(command, "stat") == 0 && argc == 5)
        return command_stat(argv + 2);
    if ((strcmp(command, "create") == 0 || strcmp(command, "unlink") == 0) && argc == 4)
        return command_small(argv + 2, command[0] == 'c');
    if (strcmp(command, "write") == 0 && argc == 4)
        return command_write(argv + 2);
    if (strcmp(command, "sink") == 0 && argc == 2)
        return command_sink();
    fputs("client: see the head of client.c for the commands\n", stderr);
    return 2;
}
