/*
 * The client of the hello suite: one operation of a small filesystem again and again, each of them timed by itself.
 *
 *   hello DIR OPERATION COUNT    stat | read | listdir of DIR with its one file, "hello"
 *
 * Prints one line of JSON: the time of all (CLOCK_MONOTONIC), and the median and the 90th percentile of one. Whatever
 * the server gives that is not the filesystem of servers/hello.py ends it with status 1.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { SIZE = 4096 };

static char expected[SIZE];
static int directory;

static void die(const char *what)
{
    fprintf(stderr, "hello: %s: %s\n", what, errno ? strerror(errno) : "not what it should be");
    exit(1);
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + time.tv_nsec;
}

static void do_stat(void)
{
    struct stat attributes;
    if (fstatat(directory, "hello", &attributes, 0) < 0)
        die("stat");
    if (attributes.st_size != SIZE || attributes.st_mode != (S_IFREG | 0444))
        errno = 0, die("attributes");
}

static void do_read(void)
{
    static char buffer[SIZE];
    int file = openat(directory, "hello", O_RDONLY | O_CLOEXEC);
    if (file < 0 || read(file, buffer, SIZE) != SIZE)
        die("read");
    if (memcmp(buffer, expected, SIZE) != 0)
        errno = 0, die("content");
    if (close(file) < 0)
        die("close");
}

static void do_listdir(void)
{
    int descriptor = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), found = 0;
    DIR *listing = descriptor < 0 ? NULL : fdopendir(descriptor);
    struct dirent *entry;
    if (!listing)
        die("opendir");
    while (errno = 0, (entry = readdir(listing)))
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            found += strcmp(entry->d_name, "hello") == 0 ? 1 : 1000;
    if (errno || found != 1)
        die("listing");
    closedir(listing);
}

static int compare(const void *one, const void *other)
{
    uint64_t left = *(const uint64_t *)one, right = *(const uint64_t *)other;
    return (left > right) - (left < right);
}

int main(int argc, char **argv)
{
    long count = argc == 4 ? atol(argv[3]) : 0;
    void (*operation)(void) = NULL;
    if (count > 0) {
        operation = strcmp(argv[2], "stat") == 0 ? do_stat : operation;
        operation = strcmp(argv[2], "read") == 0 ? do_read : operation;
        operation = strcmp(argv[2], "listdir") == 0 ? do_listdir : operation;
    }
    if (!operation) {
        fputs("hello: see the head of hello.c for the arguments\n", stderr);
        return 2;
    }
    static const char phrase[] = "Hello, world. ";
    for (int i = 0; i < SIZE - 8; i++)
        expected[i] = phrase[i % 14];
    memcpy(expected + SIZE - 8, "Goodbye.", 8);
    uint64_t *times = calloc(count, sizeof *times);
    directory = open(argv[1], O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0 || !times)
        die(argv[1]);
    operation(); /* the first one opens ways that the others find open */
    uint64_t began = now(), last = began;
    for (long i = 0; i < count; i++) {
        operation();
        uint64_t moment = now();
        times[i] = moment - last;
        last = moment;
    }
    qsort(times, count, sizeof *times, compare);
    printf("{\"ns\": %llu, \"median_ns\": %llu, \"p90_ns\": %llu}\n", (unsigned long long)(last - began),
           (unsigned long long)times[count / 2], (unsigned long long)times[count * 9 / 10]);
    return 0;
}
