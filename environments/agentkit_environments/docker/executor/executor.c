/*
 * The executor of a container: runs commands and handles files for the harness.
 *
 *     executor UID GID OPEN_FILES MEMORY_BYTES CAPABILITIES PROXY_PORT
 *
 * UID and GID are those of the agent, OPEN_FILES the limit on descriptors of each command, MEMORY_BYTES the limit on
 * this program's own memory, CAPABILITIES the hexadecimal set of those that commands of root may have, usually 0.
 * PROXY_PORT is the port of the harness's proxy in the container, or 0 for none. The executor is PID 1 of the container
 * and ends with its standard input.
 *
 * The protocol is that of ../../executor.py, which documents the frames: requests on standard input, replies on
 * standard output. Operations: exec, cancel, read_file, write_file, kill_all. A request may have the field `user`, the
 * texts of a uid, a gid and further gids (files ignore these); the default is the agent. Replies have numbers only; the
 * harness adds the text of an errno and the path.
 *
 * It is a static program and uses nothing of the image except what commands name: no shell, no libraries, no /etc.
 *
 * Privileges. It runs as root with four capabilities and never lends them:
 *   SETUID, SETGID  to start commands as their user, and to handle files as the agent (setfsuid), so that the kernel
 *                   checks permissions as it does for a command;
 *   KILL            to stop and kill commands of any user;
 *   SETPCAP         to remove every capability but CAPABILITIES from what a command could ever gain.
 * Commands cannot signal it (another uid; for root's commands: no handlers, so the kernel protects PID 1), read its
 * memory, take its descriptors or trace it (it is not dumpable).
 *
 * It has one thread and one poll loop, and never waits for a command. build.py compiles it.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PROXY_SOCKET "/.agentkit/proxy" /* as in hardening.py */
#define COOKIE_NAME "AGENTKIT_COMMAND"
#define NEVER 1e300
#define CHUNK_EVERY_S 0.05 /* as in executor.py */
enum {
    REQUESTS = 0,          /* descriptor of requests */
    REPLIES = 1,           /* descriptor of replies */
    CHUNK = 1 << 16,       /* bytes moved at once */
    SENT_BYTES = 4000,     /* of output before a reply; with its header at most PIPE_BUF */
    SENT_AT_ONCE = 4,
    UNREAD_BYTES = 1 << 14,
    PIPE_MOST = 1 << 20,   /* bytes that a pipe can hold */
    MAX_HEADER = 8 << 20,  /* as in connection.py */
    MAX_FIELDS = 16,
    COOKIE_BYTES = 12,
    KILL_TIMEOUT_S = 2,    /* as in executor.py */
    START_TIMEOUT_S = 10,
    MOST_STOPS = 20,
};

struct user {
    uid_t uid;
    gid_t gid;
    size_t group_count;
    gid_t groups[64];
};

static struct user agent;
static rlim_t command_files;
static unsigned long long command_capabilities;
static char scratch[CHUNK];

static void die(const char *why) {
    dprintf(2, "executor: %s: %s\n", why, strerror(errno));
    _exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void nap(void) {
    nanosleep(&(struct timespec){0, 1000000}, NULL);
}

static ssize_t read_again(int fd, void *data, size_t size) {
    ssize_t count;
    do
        count = read(fd, data, size);
    while (count < 0 && errno == EINTR);
    return count;
}

/* The kernel then checks file permissions, and the right to read /proc/PID/environ, as for a process of this user.
 * Changing the user may make a process dumpable, depending on a setting of the host. */
static void act_as(const struct user *user) {
    setfsgid(user->gid);
    setfsuid(user->uid);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
}

static void act_as_root(void) {
    act_as(&(struct user){0});
}

/* ---- Requests: the JSON of Python's json.dumps, restricted to what requests hold ----
 *
 * A header is one object. A value is a number, true, false, null, a text, a list of texts, or an object of texts.
 * Texts are decoded in place, in the header's own memory, which they never outgrow, and end with a NUL byte. The texts
 * of a list follow one another; those of an object become "name=value". The parser accepts nothing else. */

enum kind { NUMBER, TEXT, LIST };

struct field {
    const char *name;
    enum kind kind;
    double number;
    char *text;    /* the text, or the first of the list */
    size_t count;  /* texts of the list */
};

struct request {
    double id;
    size_t count;
    struct field fields[MAX_FIELDS];
};

static char *cursor; /* the next byte to parse; the header ends with a NUL byte */

static bool take(char expected) {
    while (*cursor == ' ')
        cursor++;
    if (*cursor != expected)
        return false;
    cursor++;
    return true;
}

static int take_hex(void) {
    int value = 0;
    for (int i = 0; i < 4; i++) {
        unsigned char digit = (unsigned char)*cursor;
        if (!isxdigit(digit))
            return -1;
        value = value * 16 + (isdigit(digit) ? digit - '0' : (digit | 32) - 'a' + 10);
        cursor++;
    }
    return value;
}

/* Decode the four digits after "\u" to UTF-8. As in Python, the surrogates DC80 to DCFF stand for the bytes 80 to FF
 * of a name that is not UTF-8. Other lone surrogates and NUL are refused. */
static char *decode_escape(char *out) {
    int code = take_hex();
    if (code <= 0)
        return NULL;
    if (code >= 0xDC80 && code <= 0xDCFF) {
        *out++ = (char)(code - 0xDC00);
        return out;
    }
    if (code >= 0xD800 && code <= 0xDFFF) {
        if (code > 0xDBFF || cursor[0] != '\\' || cursor[1] != 'u')
            return NULL;
        cursor += 2;
        int low = take_hex();
        if (low < 0xDC00 || low > 0xDFFF)
            return NULL;
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (code < 0x80) {
        *out++ = (char)code;
        return out;
    }
    if (code < 0x800) {
        *out++ = (char)(0xC0 | code >> 6);
    } else {
        if (code < 0x10000) {
            *out++ = (char)(0xE0 | code >> 12);
        } else {
            *out++ = (char)(0xF0 | code >> 18);
            *out++ = (char)(0x80 | (code >> 12 & 0x3F));
        }
        *out++ = (char)(0x80 | (code >> 6 & 0x3F));
    }
    *out++ = (char)(0x80 | (code & 0x3F));
    return out;
}

/* Decode the text at the cursor to `out`, at or before the cursor; return the end of the decoded bytes or NULL. */
static char *parse_text(char *out) {
    static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    if (!take('"'))
        return NULL;
    while (*cursor != '"') {
        unsigned char c = (unsigned char)*cursor++;
        if (c < 0x20)
            return NULL; /* also the end of the header */
        if (c != '\\') {
            *out++ = (char)c;
            continue;
        }
        char escape = *cursor++;
        const char *found = escape ? strchr(escapes, escape) : NULL;
        if (found)
            *out++ = meanings[found - escapes];
        else if (escape != 'u' || !(out = decode_escape(out)))
            return NULL;
    }
    cursor++;
    return out;
}

static bool parse_list(struct field *field, bool is_object) {
    char *out = field->text = cursor;
    char close = is_object ? '}' : ']';
    field->kind = LIST;
    cursor++;
    if (take(close))
        return true;
    do {
        if (!(out = parse_text(out)))
            return false;
        if (is_object) {
            if (!take(':'))
                return false;
            *out++ = '=';
            if (!(out = parse_text(out)))
                return false;
        }
        *out++ = '\0';
        field->count++;
    } while (take(','));
    return take(close);
}

static bool parse_value(struct field *field) {
    static const struct {
        const char *word;
        double number;
    } words[] = {{"true", 1}, {"false", 0}, {"null", NEVER}, {"Infinity", NEVER}};
    while (*cursor == ' ')
        cursor++;
    if (*cursor == '[' || *cursor == '{')
        return parse_list(field, *cursor == '{');
    if (*cursor == '"') {
        char *start = cursor, *end = parse_text(start);
        if (!end)
            return false;
        *end = '\0';
        field->kind = TEXT, field->text = start;
        return true;
    }
    field->kind = NUMBER;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t length = strlen(words[i].word);
        if (strncmp(cursor, words[i].word, length) == 0) {
            cursor += length;
            field->number = words[i].number;
            return true;
        }
    }
    char *end;
    field->number = strtod(cursor, &end);
    bool found = end != cursor && (isdigit((unsigned char)*cursor) || *cursor == '-');
    cursor = end;
    return found;
}

/* Parse a header. If it is malformed, the request has the fields up to the fault. */
static bool parse_request(char *header, struct request *request) {
    *request = (struct request){0};
    cursor = header;
    if (!take('{'))
        return false;
    do {
        if (request->count == MAX_FIELDS)
            return false;
        struct field *field = &request->fields[request->count];
        while (*cursor == ' ')
            cursor++;
        char *name = cursor, *end = parse_text(name);
        if (!end || !take(':'))
            return false;
        *end = '\0';
        field->name = name;
        if (!parse_value(field))
            return false;
        if (strcmp(name, "id") == 0 && field->number >= 0 && field->number < 1e15)
            request->id = field->number;
        request->count++;
    } while (take(','));
    return take('}') && *cursor == '\0';
}

static const struct field *find_field(const struct request *request, const char *name, enum kind kind) {
    for (size_t i = 0; i < request->count; i++)
        if (strcmp(request->fields[i].name, name) == 0 && request->fields[i].kind == kind)
            return &request->fields[i];
    return NULL;
}

static const char *text_of(const struct request *request, const char *name) {
    const struct field *field = find_field(request, name, TEXT);
    return field ? field->text : NULL;
}

/* A number that is null or missing is NEVER. */
static double number_of(const struct request *request, const char *name) {
    const struct field *field = find_field(request, name, NUMBER);
    return field ? field->number : NEVER;
}

static size_t size_of(const struct request *request, const char *name) {
    double number = number_of(request, name);
    return number < 0 ? 0 : number > 1e15 ? (size_t)1 << 50 : (size_t)number;
}

static struct user user_of(const struct request *request) {
    const struct field *list = find_field(request, "user", LIST);
    if (!list || list->count < 2)
        return agent;
    struct user user = {0};
    char *text = list->text;
    for (size_t i = 0; i < list->count; i++, text += strlen(text) + 1) {
        unsigned number = (unsigned)strtoul(text, NULL, 10);
        if (i == 0)
            user.uid = number;
        else if (i == 1)
            user.gid = number;
        else if (user.group_count < sizeof user.groups / sizeof *user.groups)
            user.groups[user.group_count++] = number;
    }
    return user;
}

/* ---- Replies ---- */

struct part {
    const void *data;
    size_t size;
};

static void write_all(const char *data, size_t size) {
    while (size) {
        ssize_t count = write(REPLIES, data, size);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            _exit(0); /* the harness is gone */
        data += count;
        size -= (size_t)count;
    }
}

static void put_size(char *out, size_t size) {
    for (int i = 0; i < 4; i++)
        out[i] = (char)(size >> (24 - 8 * i));
}

/* Send a frame. A small one is one write, which arrives as one piece. */
static void reply(const char *header, const struct part *parts, size_t count) {
    static char frame[CHUNK];
    size_t length = strlen(header), body = 0, filled = 8 + length;
    for (size_t i = 0; i < count; i++)
        body += parts[i].size;
    put_size(frame, length);
    put_size(frame + 4, body);
    memcpy(frame + 8, header, length);
    bool is_small = body <= sizeof frame - filled;
    for (size_t i = 0; is_small && i < count; i++) {
        if (parts[i].size)
            memcpy(frame + filled, parts[i].data, parts[i].size);
        filled += parts[i].size;
    }
    write_all(frame, filled);
    for (size_t i = 0; !is_small && i < count; i++)
        write_all(parts[i].data, parts[i].size);
}

static void reply_done(double id, const void *data, size_t size) {
    char header[64];
    snprintf(header, sizeof header, "{\"id\": %.0f}", id);
    reply(header, &(struct part){data, size}, 1);
}

/* `message` is plain ASCII; NULL means the usual text of `number`. */
static void reply_error(double id, int number, const char *message) {
    char header[160];
    const char *quote = message ? "\"" : "";
    snprintf(header, sizeof header, "{\"id\": %.0f, \"errno\": %d, \"message\": %s%s%s}", id, number, quote,
             message ? message : "null", quote);
    reply(header, NULL, 0);
}

static void reply_result(double id, int exit_code, bool truncated, bool timed_out, double duration_s,
                         size_t stdout_size, const struct part *parts, size_t count) {
    char header[256];
    snprintf(header, sizeof header,
             "{\"id\": %.0f, \"exit_code\": %d, \"stdout\": %zu, \"truncated\": %s, \"timed_out\": %s, "
             "\"duration_s\": %.6f}",
             id, exit_code, stdout_size, truncated ? "true" : "false", timed_out ? "true" : "false", duration_s);
    reply(header, parts, count);
}

/* ---- Output: the first and the last half of `limit` bytes of a stream, in bounded memory ----
 *
 * The tail holds up to twice its limit before its older half is dropped. If memory runs out, less is kept. */

struct output {
    char *head, *tail;
    size_t head_size, head_room, head_limit;
    size_t tail_size, tail_room, tail_limit;
    size_t sent; /* bytes of the head, in chunks before the reply */
    uint64_t total;
};

static void limit_output(struct output *output, size_t limit) {
    output->head_limit = limit - limit / 2;
    output->tail_limit = limit / 2;
}

/* Make room for `size` bytes, at most `most`; return whether there is. */
static bool grow(char **data, size_t *room, size_t size, size_t most) {
    if (size <= *room)
        return true;
    size_t wanted = *room * 2 > size ? *room * 2 : size;
    wanted = wanted < 4096 ? 4096 : wanted;
    wanted = wanted > most ? most : wanted;
    char *larger = wanted >= size ? realloc(*data, wanted) : NULL;
    if (!larger)
        return false;
    *data = larger;
    *room = wanted;
    return true;
}

static void drop_older(struct output *output) {
    if (output->tail_size > output->tail_limit) {
        memmove(output->tail, output->tail + output->tail_size - output->tail_limit, output->tail_limit);
        output->tail_size = output->tail_limit;
    }
}

static void add_output(struct output *output, const char *data, size_t size) {
    output->total += size;
    size_t first = output->head_limit - output->head_size;
    first = first < size ? first : size;
    if (first && !grow(&output->head, &output->head_room, output->head_size + first, output->head_limit)) {
        output->head_limit = output->head_size;
        first = 0;
    }
    if (first)
        memcpy(output->head + output->head_size, data, first);
    output->head_size += first;
    data += first;
    size -= first;
    while (size && output->tail_limit) {
        if (size > output->tail_limit) {
            data += size - output->tail_limit;
            size = output->tail_limit;
            output->tail_size = 0;
        }
        if (grow(&output->tail, &output->tail_room, output->tail_size + size, 2 * output->tail_limit)) {
            memcpy(output->tail + output->tail_size, data, size);
            output->tail_size += size;
            return;
        }
        if (output->tail_room < 2 * output->tail_limit)
            output->tail_limit = output->tail_room / 2; /* out of memory */
        drop_older(output);
    }
}

static bool is_truncated(const struct output *output) {
    return output->total > output->head_limit + output->tail_limit;
}

/* Fill in up to three parts; `line` is room for the line that gives the number of bytes cut. */
static size_t output_parts(struct output *output, struct part *parts, char *line, size_t line_size) {
    size_t count = 0;
    parts[count++] = (struct part){output->head, output->head_size};
    if (is_truncated(output)) {
        drop_older(output);
        uint64_t cut = output->total - output->head_size - output->tail_size;
        int length = snprintf(line, line_size, "\n[... %llu bytes cut ...]\n", (unsigned long long)cut);
        parts[count++] = (struct part){line, (size_t)length};
    }
    parts[count++] = (struct part){output->tail, output->tail_size};
    return count;
}

static void free_output(struct output *output) {
    free(output->head);
    free(output->tail);
    *output = (struct output){0};
}

/* ---- Commands ---- */

enum stage { STAGE_START, STAGE_CWD, STAGE_EXEC };
enum { IN, OUT, ERR, STATUS, PIPES };

struct failure { /* what a process writes to its status pipe if it cannot become the program */
    int stage, number;
};

struct command {
    struct command *next;
    double id;
    pid_t pid; /* 0 after its end; then background processes may still hold its pipes */
    struct user user;
    char *header; /* the request's memory, which holds argv and cwd */
    const char *program, *cwd;
    char *body; /* standard input */
    size_t body_size, body_sent;
    int fds[PIPES]; /* our ends; -1 if closed. STATUS ends when the process becomes the command's program. */
    struct output output[2];
    struct failure failure;
    bool has_failed, timed_out, has_chunks;
    double started, deadline, start_deadline, chunk_at;
    char cookie[2 * COOKIE_BYTES + 1];
};

static struct command *commands;

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* Free what a command no longer needs; return whether it is over and all its pipes are closed. */
static bool release(struct command *command) {
    if (command->pid == 0) {
        free(command->header), command->header = NULL;
        free(command->body), command->body = NULL;
        free_output(&command->output[0]);
        free_output(&command->output[1]);
    }
    bool is_open = false;
    for (int i = 0; i < PIPES; i++)
        is_open |= command->fds[i] >= 0;
    return command->pid == 0 && !is_open;
}

/* Move data through one pipe without blocking; return the number of bytes, or 0 if it would block or was closed. */
static size_t move(struct command *command, int pipe) {
    int *fd = &command->fds[pipe];
    ssize_t count;
    if (pipe == IN) {
        size_t left = command->body_size - command->body_sent;
        count = write(*fd, command->body + command->body_sent, left < CHUNK ? left : CHUNK);
        if (count > 0)
            command->body_sent += (size_t)count;
        if (count > 0 && command->body_sent < command->body_size)
            return (size_t)count;
    } else {
        count = read(*fd, scratch, sizeof scratch);
        if (count > 0) {
            if (pipe != STATUS && command->pid)
                add_output(&command->output[pipe - OUT], scratch, (size_t)count);
            if (pipe == STATUS && count == sizeof command->failure) {
                memcpy(&command->failure, scratch, sizeof command->failure);
                command->has_failed = true;
            }
            return (size_t)count;
        }
    }
    if (count < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    close_fd(fd); /* the end of the data, or the other end is closed */
    return 0;
}

/* Reply as a shell would for a program that cannot be started. */
static void reply_failure(const struct command *command, struct failure failure) {
    const char *program = command->program, *text = strerror(failure.number);
    int code = 126;
    struct part parts[3] = {{program, strlen(program)}, {": ", 2}, {"", 0}};
    char said[128];
    if (failure.stage == STAGE_CWD) {
        if (failure.number == ENOENT || failure.number == ENOTDIR) {
            reply_error(command->id, failure.number, NULL);
            return;
        }
        parts[0] = (struct part){"cannot start in ", 16};
        parts[1] = (struct part){command->cwd, strlen(command->cwd)};
        snprintf(said, sizeof said, ": %s\n", text);
    } else if (failure.stage == STAGE_EXEC && failure.number == ENOENT) {
        code = 127;
        snprintf(said, sizeof said, "not found\n");
    } else if (failure.stage == STAGE_START && failure.number == EAGAIN) {
        snprintf(said, sizeof said, "cannot start: too many processes\n");
    } else {
        snprintf(said, sizeof said, "cannot execute: %s\n", text);
    }
    parts[2] = (struct part){said, strlen(said)};
    reply_result(command->id, code, false, false, 0, 0, parts, 3);
}

/* Reply for a command whose process has ended. */
static void finish(struct command *command, int status) {
    close_fd(&command->fds[IN]);
    for (int pipe = OUT; pipe < PIPES; pipe++) {
        /* A background process that keeps writing must not keep this loop going. */
        for (size_t moved = 0, more = 1; more && command->fds[pipe] >= 0 && moved < PIPE_MOST; moved += more)
            more = move(command, pipe);
    }
    if (command->has_failed) {
        reply_failure(command, command->failure);
    } else {
        int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
        bool truncated = is_truncated(&command->output[0]) || is_truncated(&command->output[1]);
        char lines[2][64];
        struct part parts[6];
        size_t count = output_parts(&command->output[0], parts, lines[0], sizeof lines[0]), stdout_size = 0;
        for (size_t i = 0; i < count; i++)
            stdout_size += parts[i].size;
        count += output_parts(&command->output[1], parts + count, lines[1], sizeof lines[1]);
        reply_result(command->id, code, truncated, command->timed_out, now() - command->started, stdout_size, parts,
                     count);
    }
    command->pid = 0;
    command->deadline = command->start_deadline = NEVER;
}

static void reap(void) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (struct command *command = commands; command; command = command->next)
            if (command->pid == pid) {
                finish(command, status);
                break;
            }
}

/* Run the program `argv[0]`, found as a shell finds it; return only on failure, with errno set. */
static void execute(char **argv, char **env) {
    const char *path = "/usr/local/bin:/usr/bin:/bin";
    char place[PATH_MAX];
    int worst = ENOENT;
    if (strchr(argv[0], '/')) {
        execve(argv[0], argv, env);
        return;
    }
    for (char **each = env; *each; each++)
        if (strncmp(*each, "PATH=", 5) == 0)
            path = *each + 5;
    while (*path) {
        size_t length = strcspn(path, ":");
        if (snprintf(place, sizeof place, "%.*s%s%s", (int)length, path, length ? "/" : "", argv[0]) <
            (int)sizeof place)
            execve(place, argv, env);
        else
            errno = ENAMETOOLONG;
        if (errno != ENOENT && errno != ENOTDIR)
            worst = errno;
        path += length + (path[length] == ':');
    }
    errno = worst;
}

static void set_limits(void) {
    struct rlimit limit = {command_files, command_files};
    setrlimit(RLIMIT_NOFILE, &limit);
    getrlimit(RLIMIT_DATA, &limit);
    limit.rlim_cur = limit.rlim_max; /* the executor's own limit is a soft one */
    setrlimit(RLIMIT_DATA, &limit);
}

/* In the new process: become the command's program, or write the reason to the status pipe. The agent can stop and
 * kill this process as soon as it has the agent's uid, but cannot trace or read it: it is not dumpable until exec. */
static void become(const struct command *command, const int *ends, char **argv, char **env) {
    const struct user *user = &command->user;
    struct failure failure = {STAGE_START, 0};
    sigset_t none;
    sigemptyset(&none);
    setsid();
    int in = ends[IN] >= 0 ? ends[IN] : open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (in < 0 || dup2(in, 0) < 0 || dup2(ends[OUT], 1) < 0 || dup2(ends[ERR], 2) < 0)
        goto fail;
    /* When memory runs out, the kernel kills commands before the executor. */
    int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (score >= 0 && write(score, "1000", 4) < 0)
        errno = 0;
    set_limits();
    for (unsigned long capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; capability++)
        if (!(command_capabilities >> capability & 1) && prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0)
            goto fail;
    if (setgroups(user->group_count, user->groups) != 0 || setresgid(user->gid, user->gid, user->gid) != 0 ||
        setresuid(user->uid, user->uid, user->uid) != 0)
        goto fail;
    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    failure.stage = STAGE_CWD;
    if (chdir(command->cwd) == 0) {
        failure.stage = STAGE_EXEC;
        execute(argv, env);
    }
fail:
    failure.number = errno ? errno : EIO;
    if (write(ends[STATUS], &failure, sizeof failure) < 0)
        _exit(125);
    _exit(127);
}

/* Return the texts of a list as an array that ends with NULL, with room for one more; NULL if there is no memory. */
static char **array_of(const struct field *list) {
    char **array = calloc(list->count + 2, sizeof *array), *text = list->text;
    for (size_t i = 0; array && i < list->count; i++, text += strlen(text) + 1)
        array[i] = text;
    return array;
}

/* Make the pipes and the process. Returns false, with errno set, if there are too few resources. */
static bool launch(struct command *command, char **argv, char **env) {
    int ends[PIPES] = {-1, -1, -1, -1};
    bool made = true;
    for (int i = command->body_size ? IN : OUT; made && i < PIPES; i++) {
        int pair[2];
        made = pipe2(pair, O_CLOEXEC) == 0;
        if (made) {
            command->fds[i] = pair[i == IN];
            ends[i] = pair[i != IN];
            fcntl(command->fds[i], F_SETFL, O_NONBLOCK);
        }
    }
    command->pid = made ? fork() : -1;
    if (command->pid == 0)
        become(command, ends, argv, env);
    int number = errno;
    for (int i = 0; i < PIPES; i++) {
        close_fd(&ends[i]);
        if (command->pid < 0)
            close_fd(&command->fds[i]);
    }
    errno = number;
    return command->pid > 0;
}

/* Start a command. Takes over the memory of header and body. */
static void start(const struct request *request, char *header, char *body, size_t body_size) {
    const struct field *argv_field = find_field(request, "argv", LIST), *env_field = find_field(request, "env", LIST);
    const char *cwd = text_of(request, "cwd");
    struct command *command = calloc(1, sizeof *command);
    char **argv = argv_field ? array_of(argv_field) : NULL, **env = env_field ? array_of(env_field) : NULL;
    if (!argv_field || !argv_field->count || !env_field || !cwd) {
        reply_error(request->id, EINVAL, "malformed request");
        goto refused;
    }
    if (!command || !argv || !env) {
        reply_error(request->id, ENOMEM, NULL);
        goto refused;
    }
    double timeout_s = number_of(request, "timeout_s");
    *command = (struct command){
        .id = request->id, .header = header, .body = body, .body_size = body_size, .program = argv[0], .cwd = cwd,
        .user = user_of(request), .fds = {-1, -1, -1, -1}, .started = now(), .chunk_at = NEVER,
        .has_chunks = number_of(request, "chunks") == 1,
    };
    command->deadline = timeout_s < NEVER ? command->started + timeout_s : NEVER;
    command->start_deadline = command->started + START_TIMEOUT_S;
    limit_output(&command->output[0], size_of(request, "max_output_bytes"));
    limit_output(&command->output[1], size_of(request, "max_output_bytes"));
    unsigned char random[COOKIE_BYTES];
    if (getrandom(random, sizeof random, 0) != sizeof random)
        die("getrandom");
    for (int i = 0; i < COOKIE_BYTES; i++)
        snprintf(command->cookie + 2 * i, 3, "%02x", random[i]);
    char variable[sizeof COOKIE_NAME + sizeof command->cookie];
    snprintf(variable, sizeof variable, "%s=%s", COOKIE_NAME, command->cookie);
    env[env_field->count] = variable;
    if (!launch(command, argv, env)) {
        reply_failure(command, (struct failure){STAGE_START, errno});
        goto refused;
    }
    command->next = commands;
    commands = command;
    free(argv);
    free(env);
    return;
refused:
    free(argv);
    free(env);
    free(command);
    free(header);
    free(body);
}

/* ---- Killing ---- */

enum { ENVIRONMENT_START = 50 }; /* field of /proc/PID/stat: see proc_pid_stat(5) */

struct process {
    pid_t pid, parent;
    bool is_stopped, is_found, is_loading;
};

/* Read the state, parent and session of a process, and the size of its environment: -1 while its program is being
 * loaded. False if it is gone or dead. */
static bool read_stat(pid_t pid, struct process *process, pid_t *session, long *environment) {
    char path[32], text[1024], *fields, state;
    int parent, group, its_session;
    unsigned long start = 0, end = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read_again(fd, text, sizeof text - 1);
    close_fd(&fd);
    if (size <= 0)
        return false;
    text[size] = '\0';
    fields = strrchr(text, ')'); /* the name before it may contain anything */
    if (!fields || sscanf(fields + 1, " %c %d %d %d", &state, &parent, &group, &its_session) != 4)
        return false;
    for (int field = 2; fields && field < ENVIRONMENT_START; field++)
        fields = strchr(fields + 1, ' ');
    if (fields)
        sscanf(fields, "%lu %lu", &start, &end);
    *process = (struct process){pid, parent, state == 'T' || state == 't', false, false};
    *session = its_session;
    *environment = end ? (long)(end - start) : -1;
    return state != 'Z' && state != 'X';
}

/* Return whether a process's environment has a variable of this value: 1 or 0, or -1 if the kernel shows none because
 * its program is being loaded. */
static int has_variable(pid_t pid, const char *value) {
    char path[32], wanted[2 * COOKIE_BYTES + 3];
    snprintf(path, sizeof path, "/proc/%d/environ", pid);
    size_t length = (size_t)snprintf(wanted, sizeof wanted, "=%s", value) + 1, kept = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool found = false, is_empty = fd >= 0;
    ssize_t size;
    while (fd >= 0 && !found && (size = read_again(fd, scratch + kept, sizeof scratch - kept - 1)) > 0) {
        is_empty = false;
        kept += (size_t)size;
        scratch[kept] = '\0'; /* the last variable may lack its end */
        found = memmem(scratch, kept + 1, wanted, length) != NULL;
        size_t tail = kept < length ? kept : length;
        memmove(scratch, scratch + kept - tail, tail);
        kept = tail;
    }
    close_fd(&fd);
    struct process process;
    pid_t session;
    long environment;
    if (is_empty && read_stat(pid, &process, &session, &environment) && environment != 0)
        return -1; /* if the program has been loaded by now, the next look sees its variables */
    return found;
}

/* Find the living processes of a command: its session, those that carry its cookie, and all their descendants; and
 * those whose program is being loaded, which may be others of these. Returns their number, or -1 if /proc cannot be
 * read. The caller frees the list. */
static int find_processes(const struct command *command, struct process **list) {
    struct process *found = NULL, process;
    size_t count = 0, room = 0;
    pid_t session;
    long environment;
    struct dirent *entry;
    DIR *proc = opendir("/proc");
    *list = NULL;
    if (!proc)
        return -1;
    act_as(&command->user);
    while ((entry = readdir(proc))) {
        pid_t pid = (pid_t)strtol(entry->d_name, NULL, 10);
        if (pid <= 1 || !read_stat(pid, &process, &session, &environment))
            continue;
        int has = session == command->pid || pid == command->pid ? 1 : has_variable(pid, command->cookie);
        process.is_found = has > 0, process.is_loading = has < 0;
        if (count == room) {
            room = room ? 2 * room : 64;
            struct process *larger = realloc(found, room * sizeof *found);
            if (!larger)
                break;
            found = larger;
        }
        found[count++] = process;
    }
    act_as_root();
    bool is_complete = entry == NULL;
    closedir(proc);
    for (bool changed = true; changed;) {
        changed = false;
        for (size_t i = 0; i < count; i++)
            for (size_t j = 0; j < count && !found[i].is_found; j++)
                if (found[j].is_found && found[j].pid == found[i].parent)
                    found[i].is_found = changed = true;
    }
    size_t kept = 0;
    for (size_t i = 0; i < count; i++)
        if (found[i].is_found || found[i].is_loading)
            found[kept++] = found[i];
    *list = found;
    return is_complete ? (int)kept : -1;
}

/* Keep the processes of a list that are in another one, too; return their number. */
static int keep_common(struct process *list, int count, const struct process *other, int other_count) {
    int kept = 0;
    for (int i = 0; i < count; i++)
        for (int j = 0; j < other_count; j++)
            if (list[i].pid == other[j].pid) {
                list[kept++] = list[i];
                break;
            }
    return kept;
}

/* Kill every process but this one. The kernel does it in one sweep, which no process can resist or outrun. */
static bool kill_everything(void) {
    double deadline = now() + KILL_TIMEOUT_S;
    while (kill(-1, SIGKILL) == 0) {
        reap();
        if (now() > deadline)
            return false;
        nap();
    }
    return true;
}

/* Kill a command and everything it has started. All are stopped before any is killed, so that none can escape by
 * forking. A process whose program is being loaded is looked at again until it shows its variables. */
static void kill_command(const struct command *command) {
    double deadline = now() + KILL_TIMEOUT_S;
    struct process *list, *before = NULL;
    int count, before_count = -1;
    bool is_any_found = true;
    for (int stops = 0; now() < deadline; nap()) {
        bool is_fresh = false;
        count = find_processes(command, &list);
        is_any_found = count < 0;
        for (int i = 0; i < count; i++)
            is_any_found |= list[i].is_found;
        if (!is_any_found && before_count >= 0) /* only those found can have started others */
            count = keep_common(list, count, before, before_count);
        /* Another command may keep continuing what is stopped here, so the number of attempts is bounded. */
        for (int i = 0; stops < MOST_STOPS && i < count; i++)
            if (list[i].is_found && !list[i].is_stopped && kill(list[i].pid, SIGSTOP) == 0)
                is_fresh = true;
        for (int i = 0; !is_fresh && i < count; i++)
            if (list[i].is_found)
                kill(list[i].pid, SIGKILL);
        stops = is_fresh ? stops + 1 : 0;
        free(before);
        before = list, before_count = count;
        if (count <= 0)
            break;
    }
    free(before);
    if (is_any_found)
        kill_everything(); /* the processes fork faster than they are killed, or /proc cannot be read */
}

static void expire(void) {
    double time = now();
    for (struct command *command = commands; command; command = command->next) {
        if (command->pid && command->deadline <= time) {
            command->timed_out = true;
            command->deadline = NEVER;
            kill_command(command);
        } else if (command->pid && command->fds[STATUS] >= 0 && command->start_deadline <= time) {
            static const char said[] = "killed: something stopped this command before its program ran\n";
            add_output(&command->output[1], said, sizeof said - 1);
            command->start_deadline = NEVER;
            kill(command->pid, SIGKILL);
        }
    }
}

/* Return whether a chunk can be sent without waiting, and would leave room for replies. */
static bool has_room(void) {
    struct pollfd replies = {REPLIES, POLLOUT, 0};
    int unread;
    return ioctl(REPLIES, FIONREAD, &unread) == 0 && unread < UNREAD_BYTES && poll(&replies, 1, 0) == 1;
}

/* Send new output of the commands whose requests ask for it, as far as there is room. */
static void send_chunks(void) {
    static const char *const names[] = {"stdout", "stderr"};
    double time = now();
    for (struct command *command = commands; command; command = command->next) {
        if (!command->pid || !command->has_chunks)
            continue;
        bool is_due = command->chunk_at <= time, has_news = false;
        for (int i = 0; i < 2; i++) {
            struct output *output = &command->output[i];
            char header[64];
            snprintf(header, sizeof header, "{\"id\": %.0f, \"chunk\": \"%s\"}", command->id, names[i]);
            size_t left = output->head_size - output->sent;
            for (int count = 0; is_due && count < SENT_AT_ONCE && left && has_room(); count++) {
                size_t size = left < SENT_BYTES ? left : SENT_BYTES;
                reply(header, &(struct part){output->head + output->sent, size}, 1);
                output->sent += size;
                left -= size;
            }
            has_news |= left > 0;
        }
        if (is_due || command->chunk_at == NEVER)
            command->chunk_at = has_news ? time + CHUNK_EVERY_S : NEVER;
    }
}

/* ---- Files, as the agent ---- */

/* Make the directories above `path`, following links; return an errno, ENOTDIR if one of them is not a directory. */
static int make_parents(const char *path) {
    char parent[PATH_MAX];
    const char *last = strrchr(path, '/');
    size_t length = last ? (size_t)(last - path) : 0;
    struct stat info;
    if (length == 0)
        return 0;
    if (length >= sizeof parent)
        return ENAMETOOLONG;
    memcpy(parent, path, length);
    parent[length] = '\0';
    if (stat(parent, &info) == 0)
        return S_ISDIR(info.st_mode) ? 0 : ENOTDIR;
    for (size_t i = 1; i <= length; i++) {
        if (parent[i] != '/' && parent[i] != '\0')
            continue;
        char end = parent[i];
        parent[i] = '\0';
        if (mkdir(parent, 0777) != 0 && errno != EEXIST)
            return errno;
        parent[i] = end;
    }
    return stat(parent, &info) == 0 && S_ISDIR(info.st_mode) ? 0 : ENOTDIR;
}

/* Return the errno for a descriptor that is not a regular file, else 0. */
static int require_regular(int fd, struct stat *info) {
    if (fstat(fd, info) != 0)
        return errno;
    return S_ISDIR(info->st_mode) ? EISDIR : S_ISREG(info->st_mode) ? 0 : EINVAL;
}

static int write_content(int fd, const char *data, size_t size) {
    struct stat info, proc;
    int number = require_regular(fd, &info);
    if (number)
        return number;
    if (stat("/proc", &proc) == 0 && info.st_dev == proc.st_dev)
        return EROFS; /* some files there change the executor's own settings */
    if (ftruncate(fd, 0) != 0)
        return errno;
    while (size) {
        ssize_t count = write(fd, data, size);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return errno;
        data += count;
        size -= (size_t)count;
    }
    return 0;
}

static int write_file(const char *path, const char *data, size_t size) {
    int number = make_parents(path);
    if (number)
        return number;
    int fd = open(path, O_WRONLY | O_CREAT | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0644);
    if (fd < 0)
        return errno;
    number = write_content(fd, data, size);
    close_fd(&fd);
    return number;
}

/* Read a regular file into memory that the caller frees; EFBIG if it has more than `most` bytes. */
static int read_file(const char *path, size_t most, char **data, size_t *size) {
    size_t room = 0;
    struct stat info;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    int number = require_regular(fd, &info);
    size_t expected = number || info.st_size < 0 ? 0 : (size_t)info.st_size;
    if (!number && expected > most)
        number = EFBIG;
    while (!number) {
        if (*size == room && !grow(data, &room, expected >= *size ? expected + 1 : *size + 1, most + 1)) {
            number = ENOMEM;
            break;
        }
        ssize_t count = read_again(fd, *data + *size, room - *size);
        if (count < 0)
            number = errno;
        if (count <= 0)
            break;
        *size += (size_t)count;
        if (*size > most)
            number = EFBIG;
    }
    close_fd(&fd);
    return number;
}

/* ---- The loop ---- */

static const char *message_of(int number) {
    return number == EINVAL ? "not a regular file" : number == ENOMEM ? "too large for the sandbox's limits" : NULL;
}

static void handle_file(const struct request *request, bool is_read, const char *body, size_t body_size) {
    const char *path = text_of(request, "path");
    char *data = NULL;
    size_t size = 0;
    if (!path) {
        reply_error(request->id, EINVAL, "no path");
        return;
    }
    struct user user = user_of(request);
    act_as(&user);
    int number = is_read ? read_file(path, size_of(request, "max_bytes"), &data, &size)
                         : write_file(path, body, body_size);
    act_as_root();
    if (number)
        reply_error(request->id, number, message_of(number));
    else
        reply_done(request->id, data, size);
    free(data);
}

/* Handle one request. Takes over the memory of header and body; `body` is NULL if there was too little for it. */
static void handle(char *header, char *body, size_t body_size) {
    struct request request;
    bool is_well_formed = parse_request(header, &request);
    const char *operation = is_well_formed ? text_of(&request, "op") : NULL;
    if (!operation) {
        reply_error(request.id, EINVAL, "malformed request");
    } else if (body_size && !body) {
        reply_error(request.id, ENOMEM, message_of(ENOMEM));
    } else if (strcmp(operation, "exec") == 0) {
        start(&request, header, body, body_size);
        return;
    } else if (strcmp(operation, "cancel") == 0) {
        double target = number_of(&request, "target");
        for (struct command *command = commands; command; command = command->next)
            if (command->pid && command->id == target) {
                kill_command(command);
                break;
            }
    } else if (strcmp(operation, "read_file") == 0) {
        handle_file(&request, true, NULL, 0);
    } else if (strcmp(operation, "write_file") == 0) {
        handle_file(&request, false, body, body_size);
    } else if (strcmp(operation, "kill_all") == 0) {
        bool all_dead = kill_everything();
        reap();
        if (all_dead)
            reply_done(request.id, NULL, 0);
        else
            reply_error(request.id, ETIMEDOUT, "processes still alive after SIGKILL");
    } else {
        reply_error(request.id, ENOSYS, "unknown operation");
    }
    free(header);
    free(body);
}

static size_t get_size(const unsigned char *bytes) {
    return (size_t)bytes[0] << 24 | (size_t)bytes[1] << 16 | (size_t)bytes[2] << 8 | bytes[3];
}

/* Read the bytes of a frame that have arrived, and handle the request when it is complete. A body that does not fit in
 * memory is discarded as it arrives. */
static void receive(void) {
    static unsigned char sizes[8];
    static char *header, *body;
    static size_t header_size, body_size, received;
    size_t header_end = sizeof sizes + header_size, wanted;
    void *place;
    if (received < sizeof sizes) {
        place = sizes + received;
        wanted = sizeof sizes - received;
    } else if (received < header_end) {
        place = header + received - sizeof sizes;
        wanted = header_end - received;
    } else {
        place = body ? body + received - header_end : scratch;
        wanted = header_end + body_size - received;
        wanted = body || wanted < CHUNK ? wanted : CHUNK;
    }
    ssize_t count = read(REQUESTS, place, wanted);
    if (count == 0)
        _exit(0); /* the harness is gone: the kernel kills everything in the container */
    if (count < 0) {
        if (errno == EINTR || errno == EAGAIN)
            return;
        die("read");
    }
    received += (size_t)count;
    if (received == sizeof sizes) {
        header_size = get_size(sizes);
        body_size = get_size(sizes + 4);
        if (header_size == 0 || header_size > MAX_HEADER)
            die("malformed frame");
        header = malloc(header_size + 1);
        if (!header)
            die("no memory for a request");
        header[header_size] = '\0';
        body = body_size ? malloc(body_size) : NULL;
    }
    if (received > sizeof sizes && received == sizeof sizes + header_size + body_size) {
        char *its_header = header, *its_body = body;
        size_t its_size = body_size;
        header = body = NULL;
        header_size = body_size = received = 0;
        handle(its_header, its_body, its_size);
    }
}

/* Wait for the next event. Returns the number of descriptors polled; the first two are requests and signals, those of
 * the commands follow in order. */
static void wait_for_events(struct pollfd **polled, size_t *room, int signals) {
    size_t count = 2;
    double next = NEVER;
    for (struct command *command = commands; command; command = command->next)
        count += PIPES;
    if (count > *room) {
        struct pollfd *larger = realloc(*polled, 2 * count * sizeof **polled);
        if (!larger)
            die("no memory");
        *polled = larger;
        *room = 2 * count;
    }
    (*polled)[0] = (struct pollfd){REQUESTS, POLLIN, 0};
    (*polled)[1] = (struct pollfd){signals, POLLIN, 0};
    count = 2;
    for (struct command *command = commands; command; command = command->next) {
        for (int i = 0; i < PIPES; i++) /* poll ignores a descriptor of -1 */
            (*polled)[count++] = (struct pollfd){command->fds[i], i == IN ? POLLOUT : POLLIN, 0};
        if (command->pid && command->deadline < next)
            next = command->deadline;
        if (command->pid && command->fds[STATUS] >= 0 && command->start_deadline < next)
            next = command->start_deadline;
        if (command->pid && command->chunk_at < next)
            next = command->chunk_at;
    }
    double wait_ms = next < NEVER ? (next - now()) * 1e3 + 1 : -1;
    int timeout = next == NEVER ? -1 : wait_ms < 0 ? 0 : wait_ms > INT_MAX ? INT_MAX : (int)wait_ms;
    if (poll(*polled, count, timeout) < 0 && errno != EINTR)
        die("poll");
}

static void serve(int signals) {
    struct pollfd *polled = NULL;
    size_t room = 0;
    for (;;) {
        wait_for_events(&polled, &room, signals);
        /* Commands first: a request may add one, and the order would no longer match. */
        size_t index = 2;
        for (struct command **link = &commands, *command; (command = *link);) {
            for (int i = 0; i < PIPES; i++, index++)
                if (polled[index].revents && command->fds[i] >= 0)
                    move(command, i);
            if (release(command)) {
                *link = command->next;
                free(command);
            } else {
                link = &command->next;
            }
        }
        if (polled[1].revents) {
            struct signalfd_siginfo info;
            while (read(signals, &info, sizeof info) > 0)
                continue;
            reap();
        }
        expire();
        send_chunks();
        if (polled[0].revents)
            receive();
    }
}

/* Listen at a port of the container's loopback interface, and hand the listening socket to the harness through a UNIX
 * socket. The harness accepts the connections of commands itself, so no program of the container has a part in it. */
static void lend_listener(uint16_t port) {
    struct sockaddr_in loopback = {.sin_family = AF_INET, .sin_port = htons(port)};
    loopback.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&loopback, sizeof loopback) != 0 ||
        listen(listener, SOMAXCONN) != 0)
        die("listen for the proxy");
    struct sockaddr_un harness = {.sun_family = AF_UNIX, .sun_path = PROXY_SOCKET};
    int channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (channel < 0 || connect(channel, (struct sockaddr *)&harness, sizeof harness) != 0)
        die("connect to " PROXY_SOCKET);
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof listener)];
    } control = {0};
    control.header.cmsg_len = CMSG_LEN(sizeof listener);
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    memcpy(CMSG_DATA(&control.header), &listener, sizeof listener);
    struct iovec byte = {"", 1};
    struct msghdr message = {
        .msg_iov = &byte, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control.room,
    };
    if (sendmsg(channel, &message, MSG_NOSIGNAL) != 1)
        die("send to " PROXY_SOCKET);
    close(channel);
    close(listener);
}

/* Older engines make capabilities inheritable; a command of root would inherit them. */
static void clear_inheritable(void) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data) != 0)
        die("capget");
    data[0].inheritable = data[1].inheritable = 0;
    if (syscall(SYS_capset, &header, data) != 0)
        die("capset");
}

int main(int argc, char **argv) {
    if (argc != 7 || getpid() != 1 || geteuid() != 0) {
        dprintf(2, "usage: executor UID GID OPEN_FILES MEMORY_BYTES CAPABILITIES PROXY_PORT, "
                   "as root and PID 1 of a container\n");
        return 2;
    }
    agent = (struct user){.uid = (uid_t)strtoul(argv[1], NULL, 10), .gid = (gid_t)strtoul(argv[2], NULL, 10)};
    command_files = strtoul(argv[3], NULL, 10);
    command_capabilities = strtoull(argv[5], NULL, 16);
    struct rlimit limit;
    getrlimit(RLIMIT_DATA, &limit);
    limit.rlim_cur = strtoul(argv[4], NULL, 10);
    if (setrlimit(RLIMIT_DATA, &limit) != 0)
        die("setrlimit");
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        die("prctl");
    if (setgroups(0, NULL) != 0 || chdir("/") != 0)
        die("setgroups");
    clear_inheritable();
    umask(022);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* a file larger than the limit is an errno */
    sigset_t children;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    int signals = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0)
        die("signalfd");
    unsigned long port = strtoul(argv[6], NULL, 10);
    if (port)
        lend_listener((uint16_t)port);
    reply("{\"id\": 0}", NULL, 0);
    serve(signals);
}
