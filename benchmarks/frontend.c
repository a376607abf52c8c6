/*
 * A virtual machine's side of a vhost-user-fs daemon, in C so that its own cost hides no differences between daemons.
 *
 * It does what QEMU and Linux do together (vhost-user messages without REPLY_ACK; split rings with indirect descriptors
 * and EVENT_IDX; a thread for each request queue). A thread sleeps on its queue's call descriptor as a guest does until
 * its interrupt, kicks only when the daemon asks for it, and takes all answers that are there before it kicks again.
 * Requests are laid into memory once per measurement and queued again and again, with another `unique` and another
 * offset in the file. Every answer is looked at: its length, error, `unique`, and the offsets that its pages hold.
 *
 * usage: frontend SOCKET READ_FILE WRITE_FILE QUEUES
 *
 * The files are names in the share's root; "-" for the second: none is written. Each 4 KiB of the first holds its own
 * offset, in words of 64 bits; what is written to the second has it inverted in the first word of each 4 KiB. The first
 * line of output says what was agreed on. For each line "OPERATION DEPTH QUEUES COUNT" of input it makes COUNT requests,
 * DEPTH of them in flight on each of the first QUEUES request queues, and prints one line of JSON.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MIB = 1 << 20, PAGES = MIB / PAGE, RING = 512, SLOTS = 16, MAX_QUEUES = 4, PATIENCE_MS = 20000 };
/* A chain of 1 MiB in pages has PAGES + 4 descriptors; none may have more than the ring (Virtio 1.2, 2.7.5.3.1). */
enum { TABLE = RING * 16, SLOT = PAGE + TABLE + MIB, RINGS = 4 * PAGE + RING * 16, QUEUE = RINGS + SLOTS * SLOT };
/* Where the four parts of a request are in its first page. */
enum { IN_HEADER = 0, IN_ARGS = 64, OUT_HEADER = 1024, OUT_ARGS = 1088 };

static const uint64_t GUEST = 0x100000000, USER = 0x7f0000000000;
static const uint64_t F_INDIRECT = 1ull << VIRTIO_RING_F_INDIRECT_DESC, F_EVENT_IDX = 1ull << VIRTIO_RING_F_EVENT_IDX;
static const uint64_t F_PROTOCOL = 1ull << 30, F_VERSION_1 = 1ull << 32, P_MQ = 1;

static int connection, memory_fd;
static char *memory;
static uint64_t memory_size;

static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("frontend: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t now(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000u + time.tv_nsec;
}

/* ---- vhost-user (QEMU, docs/interop/vhost-user.rst) ---- */

enum {
    GET_FEATURES = 1, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR, SET_VRING_BASE,
    SET_VRING_KICK = 12, SET_VRING_CALL, SET_VRING_ERR, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM,
    SET_VRING_ENABLE
};

struct message {
    uint32_t request, flags, size;
    uint64_t words[8];
} __attribute__((packed));

static void tell(uint32_t request, const void *body, size_t size, int fd)
{
    struct message message = {.request = request, .flags = 1, .size = size};
    memcpy(message.words, body, size);
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec piece = {&message, 12 + size};
    struct msghdr head = {.msg_iov = &piece, .msg_iovlen = 1};
    if (fd >= 0) {
        head.msg_control = &control;
        head.msg_controllen = sizeof control;
        struct cmsghdr *one = CMSG_FIRSTHDR(&head);
        one->cmsg_level = SOL_SOCKET;
        one->cmsg_type = SCM_RIGHTS;
        one->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(one), &fd, sizeof fd);
    }
    if (sendmsg(connection, &head, MSG_NOSIGNAL) != (ssize_t)(12 + size))
        die("message %u cannot be sent: %s", request, strerror(errno));
}

static uint64_t ask(uint32_t request)
{
    struct message message;
    tell(request, NULL, 0, -1);
    ssize_t got = recv(connection, &message, 20, MSG_WAITALL);
    if (got != 20 || message.request != request || message.size != 8)
        die("message %u: no proper answer", request);
    return message.words[0];
}

static void tell_number(uint32_t request, uint64_t number, int fd)
{
    tell(request, &number, sizeof number, fd);
}

static void tell_state(uint32_t request, uint32_t index, uint32_t number)
{
    tell(request, (uint32_t[]){index, number}, 8, -1);
}

/* ---- queues ---- */

struct queue {
    int index, kick, call, error;
    char *base;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint16_t filled, shown, seen;
    uint64_t kicks, calls;
};

static struct queue queues[1 + MAX_QUEUES];

static uint64_t guest(const void *there)
{
    return GUEST + (uint64_t)((const char *)there - memory);
}

static void start_queue(int index)
{
    struct queue *queue = &queues[index];
    queue->index = index;
    queue->base = memory + (size_t)index * QUEUE;
    queue->desc = (void *)queue->base;
    queue->avail = (void *)(queue->base + RING * 16);
    queue->used = (void *)(queue->base + RING * 16 + PAGE);
    queue->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    queue->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    queue->error = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (queue->kick < 0 || queue->call < 0 || queue->error < 0)
        die("eventfd: %s", strerror(errno));
    tell_state(SET_VRING_NUM, index, RING);
    tell_state(SET_VRING_BASE, index, 0);
    struct {
        uint32_t index, flags;
        uint64_t desc, used, avail, log;
    } where = {index, 0, guest(queue->desc) - GUEST + USER, guest(queue->used) - GUEST + USER,
               guest(queue->avail) - GUEST + USER, 0};
    tell(SET_VRING_ADDR, &where, sizeof where, -1);
    tell_number(SET_VRING_CALL, index, queue->call);
    tell_number(SET_VRING_ERR, index, queue->error);
    tell_number(SET_VRING_KICK, index, queue->kick);
    tell_state(SET_VRING_ENABLE, index, 1);
}

static void push(struct queue *queue, uint16_t head)
{
    queue->avail->ring[queue->filled % RING] = head;
    queue->filled++;
}

/* Shows the daemon what was pushed, and wakes it if it asks for that (Virtio 1.2, 2.7.13). */
static void kick(struct queue *queue)
{
    __atomic_store_n(&queue->avail->idx, queue->filled, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint16_t event = __atomic_load_n((uint16_t *)&queue->used->ring[RING], __ATOMIC_RELAXED);
    if (vring_need_event(event, queue->filled, queue->shown)) {
        eventfd_write(queue->kick, 1);
        queue->kicks++;
    }
    queue->shown = queue->filled;
}

static int answered(struct queue *queue)
{
    return __atomic_load_n(&queue->used->idx, __ATOMIC_ACQUIRE) != queue->seen;
}

/* Sleeps until there is an answer. */
static void wait_for(struct queue *queue)
{
    while (!answered(queue)) {
        __atomic_store_n(&queue->avail->ring[RING], queue->seen, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (answered(queue))
            return;
        struct pollfd ready[3] = {{queue->call, POLLIN, 0}, {queue->error, POLLIN, 0}, {connection, POLLRDHUP, 0}};
        int count = poll(ready, 3, PATIENCE_MS);
        if (count == 0)
            die("queue %d: no answer for %d s", queue->index, PATIENCE_MS / 1000);
        if (ready[1].revents || ready[2].revents)
            die("queue %d: the daemon gave up", queue->index);
        eventfd_t calls;
        if (eventfd_read(queue->call, &calls) == 0)
            queue->calls++;
    }
}

/* ---- requests ---- */

struct operation {
    const char *name;
    uint32_t opcode, in_args, out_args, in_data, out_data;
    int pages; /* data in descriptors of a page each, as Linux has it, and none beside its neighbour */
};

static const struct operation operations[] = {
    {"lookup", FUSE_LOOKUP, 0, sizeof(struct fuse_entry_out), 0, 0, 0},
    {"getattr", FUSE_GETATTR, sizeof(struct fuse_getattr_in), sizeof(struct fuse_attr_out), 0, 0, 0},
    {"read4k", FUSE_READ, sizeof(struct fuse_read_in), 0, 0, PAGE, 0},
    {"read1m", FUSE_READ, sizeof(struct fuse_read_in), 0, 0, MIB, 0},
    {"read1m_pages", FUSE_READ, sizeof(struct fuse_read_in), 0, 0, MIB, 1},
    {"write4k", FUSE_WRITE, sizeof(struct fuse_write_in), sizeof(struct fuse_write_out), PAGE, 0, 0},
    {"write1m", FUSE_WRITE, sizeof(struct fuse_write_in), sizeof(struct fuse_write_out), MIB, 0, 0},
    {"write1m_pages", FUSE_WRITE, sizeof(struct fuse_write_in), sizeof(struct fuse_write_out), MIB, 0, 1},
};

static const char *read_name, *write_name;
static uint64_t file_size, read_node, read_handle, write_node, write_handle;
static _Atomic uint64_t unique_next = 2;

static char *slot_of(struct queue *queue, int slot)
{
    return queue->base + RINGS + (size_t)slot * SLOT;
}

static uint64_t *page_of(char *slot, int page, int scattered)
{
    return (uint64_t *)(slot + PAGE + TABLE + (size_t)PAGE * (scattered ? page * 101 % PAGES : page));
}

static int add(struct vring_desc *table, int count, const void *there, uint32_t size, int write)
{
    if (size == 0)
        return count;
    if (count)
        table[count - 1].flags |= VRING_DESC_F_NEXT;
    table[count] = (struct vring_desc){guest(there), size, write ? VRING_DESC_F_WRITE : 0, count + 1};
    return count + 1;
}

static int add_data(struct vring_desc *table, int count, char *slot, uint32_t size, int pages, int write)
{
    if (!pages)
        return add(table, count, page_of(slot, 0, 0), size, write);
    for (int page = 0; page < (int)(size / PAGE); page++)
        count = add(table, count, page_of(slot, page, 1), PAGE, write);
    return count;
}

/* Lays a request out as virtio_fs_enqueue_req of Linux does: header, arguments, pages; header, arguments, pages. */
static void lay(struct queue *queue, int slot, const struct operation *op, uint64_t node, const void *args,
                uint32_t length)
{
    char *home = slot_of(queue, slot);
    struct vring_desc *table = (void *)(home + PAGE);
    struct fuse_in_header *header = (void *)(home + IN_HEADER);
    uint32_t total = sizeof *header + length + op->in_data;
    *header = (struct fuse_in_header){.len = total, .opcode = op->opcode, .nodeid = node, .pid = 1};
    memcpy(home + IN_ARGS, args, length);
    int count = add(table, 0, header, sizeof *header, 0);
    count = add(table, count, home + IN_ARGS, length, 0);
    count = add_data(table, count, home, op->in_data, op->pages, 0);
    count = add(table, count, home + OUT_HEADER, sizeof(struct fuse_out_header), 1);
    count = add(table, count, home + OUT_ARGS, op->out_args, 1);
    count = add_data(table, count, home, op->out_data, op->pages, 1);
    queue->desc[slot] = (struct vring_desc){guest(table), count * sizeof *table, VRING_DESC_F_INDIRECT, 0};
}

static uint16_t take(struct queue *queue, uint32_t *length)
{
    wait_for(queue);
    struct vring_used_elem *element = &queue->used->ring[queue->seen++ % RING];
    *length = element->len;
    return element->id;
}

/* Makes one request on the first request queue; the answer's arguments are at what is returned. */
static void *once(uint32_t opcode, uint64_t node, const void *args, uint32_t length, uint32_t room, int may_be_short)
{
    struct operation op = {"", opcode, length, room, 0, 0, 0};
    struct queue *queue = &queues[1];
    uint32_t got;
    lay(queue, 0, &op, node, args, length);
    struct fuse_in_header *in = (void *)(slot_of(queue, 0) + IN_HEADER);
    struct fuse_out_header *out = (void *)(slot_of(queue, 0) + OUT_HEADER);
    in->unique = unique_next += 2;
    push(queue, 0);
    kick(queue);
    take(queue, &got);
    if (out->error || out->unique != in->unique || out->len != got || (!may_be_short && got != sizeof *out + room))
        die("request %u: error %d, %u bytes", opcode, -out->error, got);
    return slot_of(queue, 0) + OUT_ARGS;
}

static void begin(void)
{
    uint32_t flags = FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES | FUSE_AUTO_INVAL_DATA | FUSE_ASYNC_DIO |
                     FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES |
                     FUSE_CACHE_SYMLINKS | FUSE_HANDLE_KILLPRIV | FUSE_POSIX_LOCKS | FUSE_FLOCK_LOCKS | FUSE_DONT_MASK;
    struct fuse_init_in init = {FUSE_KERNEL_VERSION, 36, MIB, flags, 0, {0}};
    struct fuse_init_out *made = once(FUSE_INIT, 0, &init, sizeof init, sizeof *made, 1);
    unsigned most = write_name ? made->max_write : (unsigned)made->max_pages * PAGE;
    if (most < MIB)
        die("the daemon takes or gives %u bytes at once; these measurements need 1 MiB", most);
    for (int writing = 0; writing < 2; writing++) {
        const char *name = writing ? write_name : read_name;
        if (!name)
            continue;
        struct fuse_entry_out *entry = once(FUSE_LOOKUP, FUSE_ROOT_ID, name, strlen(name) + 1, sizeof *entry, 0);
        uint64_t node = entry->nodeid;
        file_size = entry->attr.size;
        struct fuse_open_in how = {.flags = writing ? O_RDWR : O_RDONLY};
        struct fuse_open_out *opened = once(FUSE_OPEN, node, &how, sizeof how, sizeof *opened, 0);
        *(writing ? &write_node : &read_node) = node;
        *(writing ? &write_handle : &read_handle) = opened->fh;
        if (file_size < 2 * MIB || file_size % MIB)
            die("%s has %llu bytes: not a multiple of 1 MiB", name, (unsigned long long)file_size);
    }
}

/* ---- measurements ---- */

struct job {
    pthread_t thread;
    pthread_barrier_t *start;
    struct queue *queue;
    const struct operation *op;
    int depth;
    uint64_t count, offset, began, end;
};

/* What differs from request to request. */
static void renew(struct job *job, int slot)
{
    char *home = slot_of(job->queue, slot);
    const struct operation *op = job->op;
    ((struct fuse_in_header *)(home + IN_HEADER))->unique = unique_next += 2;
    uint32_t size = op->in_data + op->out_data;
    if (size == 0)
        return;
    struct fuse_read_in *args = (void *)(home + IN_ARGS); /* as fuse_write_in begins */
    args->offset = job->offset;
    job->offset = (job->offset + size) % file_size;
    if (op->in_data)
        for (int page = 0; page < (int)(size / PAGE); page++)
            *page_of(home, page, op->pages) = ~(args->offset + (uint64_t)page * PAGE);
}

static void judge(struct job *job, int slot, uint32_t got)
{
    char *home = slot_of(job->queue, slot);
    const struct operation *op = job->op;
    struct fuse_in_header *in = (void *)(home + IN_HEADER);
    struct fuse_out_header *out = (void *)(home + OUT_HEADER);
    if (out->unique != in->unique || out->error || out->len != got || got != sizeof *out + op->out_args + op->out_data)
        die("%s: error %d, %u bytes, unique %llu for %llu", op->name, -out->error, got,
            (unsigned long long)out->unique, (unsigned long long)in->unique);
    uint64_t offset = ((struct fuse_read_in *)(home + IN_ARGS))->offset;
    for (int page = 0; page < (int)(op->out_data / PAGE); page++) {
        uint64_t *word = page_of(home, page, op->pages), right = offset + (uint64_t)page * PAGE;
        if (word[0] != right)
            die("%s: the page at %#llx holds what is wrong", op->name, (unsigned long long)right);
        word[0] = ~right; /* so that an answer without contents is not taken for one with */
    }
    if (op->in_data && ((struct fuse_write_out *)(home + OUT_ARGS))->size != op->in_data)
        die("%s: only %u bytes are written", op->name, ((struct fuse_write_out *)(home + OUT_ARGS))->size);
    if (op->opcode == FUSE_LOOKUP && ((struct fuse_entry_out *)(home + OUT_ARGS))->nodeid != read_node)
        die("%s: another node", op->name);
    if (op->opcode == FUSE_GETATTR && ((struct fuse_attr_out *)(home + OUT_ARGS))->attr.size != file_size)
        die("%s: another size", op->name);
}

static void prepare(struct job *job)
{
    const struct operation *op = job->op;
    for (int slot = 0; slot < job->depth; slot++) {
        struct fuse_write_in data = {.size = op->in_data + op->out_data}; /* as fuse_read_in, as far as it is used */
        data.fh = op->in_data ? write_handle : read_handle;
        if (op->opcode == FUSE_LOOKUP)
            lay(job->queue, slot, op, FUSE_ROOT_ID, read_name, strlen(read_name) + 1);
        else if (op->opcode == FUSE_GETATTR)
            lay(job->queue, slot, op, read_node, &(struct fuse_getattr_in){0}, op->in_args);
        else
            lay(job->queue, slot, op, op->in_data ? write_node : read_node, &data, op->in_args);
    }
}

static void *drive(void *argument)
{
    struct job *job = argument;
    struct queue *queue = job->queue;
    uint64_t sent = 0, done = 0;
    prepare(job);
    pthread_barrier_wait(job->start);
    job->began = now(CLOCK_MONOTONIC);
    for (; sent < job->count && sent < (uint64_t)job->depth; sent++) {
        renew(job, sent);
        push(queue, sent);
    }
    kick(queue);
    while (done < job->count) {
        wait_for(queue);
        do {
            uint32_t got;
            uint16_t slot = take(queue, &got);
            if (slot >= job->depth)
                die("the daemon used a request that there is not");
            judge(job, slot, got);
            done++;
            if (sent < job->count) {
                renew(job, slot);
                push(queue, slot);
                sent++;
            }
        } while (done < job->count && answered(queue));
        if (queue->shown != queue->filled)
            kick(queue);
    }
    job->end = now(CLOCK_MONOTONIC);
    return NULL;
}

static void measure(const struct operation *op, int depth, int many, uint64_t count)
{
    struct job jobs[MAX_QUEUES];
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, many + 1);
    uint64_t kicks = 0, calls = 0;
    for (int i = 0; i < many; i++) {
        struct job *job = &jobs[i];
        *job = (struct job){.start = &start, .queue = &queues[1 + i], .op = op, .depth = depth};
        job->count = count / many + (i < (int)(count % many));
        job->offset = file_size / many / MIB * MIB * i;
        job->queue->kicks = job->queue->calls = 0;
        if (pthread_create(&job->thread, NULL, drive, job))
            die("no thread");
    }
    uint64_t own = now(CLOCK_PROCESS_CPUTIME_ID);
    pthread_barrier_wait(&start);
    uint64_t began = UINT64_MAX, end = 0;
    for (int i = 0; i < many; i++) {
        pthread_join(jobs[i].thread, NULL);
        began = jobs[i].began < began ? jobs[i].began : began;
        end = jobs[i].end > end ? jobs[i].end : end;
        kicks += jobs[i].queue->kicks;
        calls += jobs[i].queue->calls;
    }
    printf("{\"ns\": %llu, \"requests\": %llu, \"own_cpu_ns\": %llu, \"kicks\": %llu, \"calls\": %llu}\n",
           (unsigned long long)(end - began), (unsigned long long)count,
           (unsigned long long)(now(CLOCK_PROCESS_CPUTIME_ID) - own), (unsigned long long)kicks,
           (unsigned long long)calls);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    if (argc != 5)
        die("usage: frontend SOCKET READ_FILE WRITE_FILE QUEUES");
    struct sockaddr_un where = {.sun_family = AF_UNIX};
    strncpy(where.sun_path, argv[1], sizeof where.sun_path - 1);
    read_name = argv[2];
    write_name = strcmp(argv[3], "-") ? argv[3] : NULL;
    int wanted = atoi(argv[4]);
    if (wanted < 1 || wanted > MAX_QUEUES)
        die("from 1 to %d queues", MAX_QUEUES);
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval patience = {PATIENCE_MS / 1000, 0};
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    for (int left = PATIENCE_MS; connect(connection, (struct sockaddr *)&where, sizeof where); left -= 5) {
        if ((errno != ENOENT && errno != ECONNREFUSED) || left <= 0)
            die("%s: %s", argv[1], strerror(errno));
        usleep(5000); /* until the daemon listens */
    }

    uint64_t needed = F_INDIRECT | F_EVENT_IDX | F_PROTOCOL | F_VERSION_1;
    uint64_t offered = ask(GET_FEATURES);
    if ((offered & needed) != needed)
        die("the daemon offers features %#llx, without some that are needed", (unsigned long long)offered);
    uint64_t protocol = ask(GET_PROTOCOL_FEATURES) & P_MQ;
    tell_number(SET_PROTOCOL_FEATURES, protocol, -1);
    int there = protocol ? (int)ask(GET_QUEUE_NUM) - 1 : 1;
    int count = there < wanted ? there : wanted;
    tell(SET_OWNER, NULL, 0, -1);
    tell_number(SET_FEATURES, needed, -1);

    memory_size = (uint64_t)(1 + count) * QUEUE;
    memory_fd = memfd_create("guest", MFD_CLOEXEC);
    if (memory_fd < 0 || ftruncate(memory_fd, memory_size))
        die("memory: %s", strerror(errno));
    memory = mmap(NULL, memory_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, memory_fd, 0);
    if (memory == MAP_FAILED)
        die("memory: %s", strerror(errno));
    uint64_t table[5] = {1, GUEST, memory_size, USER, 0};
    tell(SET_MEM_TABLE, table, sizeof table, memory_fd);
    for (int index = 0; index <= count; index++)
        start_queue(index);
    ask(GET_FEATURES); /* so that all of it has been done */
    begin();
    printf("{\"queues\": %d, \"features\": \"%#llx\"}\n", count, (unsigned long long)offered);
    fflush(stdout);

    char name[32];
    int depth, many;
    unsigned long long requests;
    while (scanf("%31s %d %d %llu", name, &depth, &many, &requests) == 4) {
        const struct operation *op = NULL;
        for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
            if (strcmp(operations[i].name, name) == 0)
                op = &operations[i];
        if (!op || depth < 1 || depth > SLOTS || many < 1 || many > count || (op->in_data && !write_name))
            die("cannot do %s %d %d", name, depth, many);
        measure(op, depth, many, requests);
    }
    return 0;
}
