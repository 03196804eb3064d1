// A host for tests: SQLite in memory, and the other effects in lists.

#define _POSIX_C_SOURCE 200809L

#include "testing.h"

#ifndef __wasm__

#include <dirent.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

// Memory until the end of the host

typedef struct kept {
    struct kept *next;
} kept;

static kept *all_kept;

static void *keep(size_t size) {
    size_t header = (sizeof(kept) + sizeof(max_align_t) - 1) / sizeof(max_align_t);
    kept *made = malloc(header * sizeof(max_align_t) + size);
    if (made == NULL) {
        perror("malloc");
        exit(1);
    }
    made->next = all_kept;
    all_kept = made;
    return (char *)made + header * sizeof(max_align_t);
}

static oncely_bytes keep_bytes(oncely_bytes bytes) {
    char *copy = keep(bytes.length + 1);
    if (bytes.length > 0) {
        memcpy(copy, bytes.data, bytes.length);
    }
    copy[bytes.length] = '\0';
    return (oncely_bytes){copy, bytes.length};
}

static const char *keep_text(const char *text) {
    return text == NULL ? NULL : keep_bytes(oncely_string(text)).data;
}

// The host

// A key of the state, of the cache or of the configuration.
typedef struct entry {
    const char *key;
    oncely_bytes value;
    uint64_t version;
    bool exists;
    struct entry *next;
} entry;

typedef struct output {
    oncely_output output;
    struct output *next;
} output;

static struct {
    void *database;
    entry *state;
    entry *cache;
    entry *config;
    output *outputs;
    uint64_t last_version;
    uint32_t attempt;
    uint64_t now;
    // The current delivery
    const oncely_message *message;
    size_t sent;
    bool is_doomed;
    jmp_buf panic;
    const char *panic_text;
} host;

static int failed_expectations;

static entry *find(entry *list, const char *key) {
    while (list != NULL && strcmp(list->key, key) != 0) {
        list = list->next;
    }
    return list;
}

static entry *put(entry **list, const char *key, oncely_bytes value) {
    entry *found = find(*list, key);
    if (found == NULL) {
        found = keep(sizeof *found);
        *found = (entry){.key = keep_text(key), .next = *list};
        *list = found;
    }
    found->value = keep_bytes(value);
    found->exists = true;
    return found;
}

static entry *copy_entries(const entry *list) {
    entry *copy = NULL;
    for (entry **end = &copy; list != NULL; list = list->next) {
        *end = keep(sizeof **end);
        **end = *list;
        end = &(*end)->next;
    }
    return copy;
}

// SQLite, as far as it is needed here. Its constants are part of its stable interface.

enum { SQLITE_OK = 0, SQLITE_CONSTRAINT = 19, SQLITE_ROW = 100, SQLITE_DONE = 101 };
enum { SQLITE_INTEGER = 1, SQLITE_FLOAT = 2, SQLITE_TEXT = 3, SQLITE_BLOB = 4 };

static struct {
    void *library;
    int (*open)(const char *, void **);
    int (*close)(void *);
    int (*exec)(void *, const char *, int (*)(void *, int, char **, char **), void *, char **);
    int (*extended_result_codes)(void *, int);
    int (*extended_errcode)(void *);
    const char *(*errmsg)(void *);
    int (*total_changes)(void *);
    int (*prepare_v2)(void *, const char *, int, void **, const char **);
    int (*finalize)(void *);
    int (*step)(void *);
    int (*bind_parameter_index)(void *, const char *);
    int (*bind_null)(void *, int);
    int (*bind_int64)(void *, int, long long);
    int (*bind_double)(void *, int, double);
    int (*bind_text)(void *, int, const char *, int, void (*)(void *));
    int (*bind_blob)(void *, int, const void *, int, void (*)(void *));
    int (*column_count)(void *);
    const char *(*column_name)(void *, int);
    int (*column_type)(void *, int);
    long long (*column_int64)(void *, int);
    double (*column_double)(void *, int);
    const void *(*column_blob)(void *, int);
    int (*column_bytes)(void *, int);
} sqlite;

static void load_function(void *function, const char *name) {
    void *symbol = dlsym(sqlite.library, name);
    if (symbol == NULL) {
        fprintf(stderr, "libsqlite3 has no function %s\n", name);
        exit(1);
    }
    // A conversion of an object pointer to a function pointer is not in the C standard.
    memcpy(function, &symbol, sizeof symbol);
}

#define LOAD(name) load_function(&sqlite.name, "sqlite3_" #name)

static void load_sqlite(void) {
    static const char *const NAMES[] = {"libsqlite3.so.0", "libsqlite3.so", "libsqlite3.dylib"};
    for (size_t i = 0; sqlite.library == NULL && i < sizeof NAMES / sizeof *NAMES; i++) {
        sqlite.library = dlopen(NAMES[i], RTLD_NOW | RTLD_LOCAL);
    }
    if (sqlite.library == NULL) {
        fprintf(stderr, "there is no libsqlite3: install it, for example with "
                        "apt-get install libsqlite3-0\n");
        exit(1);
    }
    LOAD(open);
    LOAD(close);
    LOAD(exec);
    LOAD(extended_result_codes);
    LOAD(extended_errcode);
    LOAD(errmsg);
    LOAD(total_changes);
    LOAD(prepare_v2);
    LOAD(finalize);
    LOAD(step);
    LOAD(bind_parameter_index);
    LOAD(bind_null);
    LOAD(bind_int64);
    LOAD(bind_double);
    LOAD(bind_text);
    LOAD(bind_blob);
    LOAD(column_count);
    LOAD(column_name);
    LOAD(column_type);
    LOAD(column_int64);
    LOAD(column_double);
    LOAD(column_blob);
    LOAD(column_bytes);
}

static void run_script(const char *script, const char *name) {
    if (sqlite.exec(host.database, script, NULL, NULL, NULL) != SQLITE_OK) {
        fprintf(stderr, "%s: %s\n", name, sqlite.errmsg(host.database));
        exit(1);
    }
}

static void open_database(void) {
    if (host.database != NULL) {
        return;
    }
    if (sqlite.library == NULL) {
        load_sqlite();
    }
    if (sqlite.open(":memory:", &host.database) != SQLITE_OK) {
        fprintf(stderr, "SQLite cannot open a database in memory\n");
        exit(1);
    }
    sqlite.extended_result_codes(host.database, 1);
    if (host.message != NULL) {
        run_script("begin", "begin");
    }
}

static bool sql_fail(void) {
    int code = sqlite.extended_errcode(host.database);
    bool is_violation = (code & 0xff) == SQLITE_CONSTRAINT;
    host.is_doomed = true;
    return oncely_fail_with((oncely_error){
        .reason = is_violation ? "constraint-violation" : "query-failed",
        .text = oncely_format("%s", sqlite.errmsg(host.database)),
        .code = oncely_format("%d", code).data,
    });
}

static void bind(void *statement, int at, oncely_value value) {
    switch (value.kind) {
    case ONCELY_NULL:
        sqlite.bind_null(statement, at);
        return;
    case ONCELY_BOOLEAN:
        sqlite.bind_int64(statement, at, value.as.boolean ? 1 : 0);
        return;
    case ONCELY_INT64:
    case ONCELY_TIMESTAMP:
        sqlite.bind_int64(statement, at, value.as.int64);
        return;
    case ONCELY_FLOAT64:
        sqlite.bind_double(statement, at, value.as.float64);
        return;
    case ONCELY_BYTES:
        sqlite.bind_blob(statement, at, value.as.bytes.data, (int)value.as.bytes.length, NULL);
        return;
    case ONCELY_DECIMAL:
    case ONCELY_TEXT:
    case ONCELY_UUID:
    case ONCELY_JSON:
    case ONCELY_DATE:
    case ONCELY_TIME:
        break;
    }
    sqlite.bind_text(statement, at, value.as.bytes.data, (int)value.as.bytes.length, NULL);
}

static oncely_value column(void *statement, int at) {
    int type = sqlite.column_type(statement, at);
    if (type == SQLITE_INTEGER) {
        return oncely_int(sqlite.column_int64(statement, at));
    }
    if (type == SQLITE_FLOAT) {
        return oncely_float(sqlite.column_double(statement, at));
    }
    if (type != SQLITE_TEXT && type != SQLITE_BLOB) {
        return oncely_null();
    }
    const void *data = sqlite.column_blob(statement, at);
    size_t length = (size_t)sqlite.column_bytes(statement, at);
    oncely_value value = oncely_blob(oncely_copy(data, length));
    value.kind = type == SQLITE_TEXT ? ONCELY_TEXT : ONCELY_BYTES;
    return value;
}

static void *prepare(const char *text, const oncely_value *params, size_t param_count) {
    open_database();
    void *statement = NULL;
    if (sqlite.prepare_v2(host.database, text, -1, &statement, NULL) != SQLITE_OK) {
        return NULL;
    }
    for (size_t i = 0; i < param_count; i++) {
        int at = sqlite.bind_parameter_index(statement, oncely_format("$%zu", i + 1).data);
        if (at > 0) {
            bind(statement, at, params[i]);
        }
    }
    return statement;
}

bool oncely_sql_query(const char *text, const oncely_value *params, size_t param_count,
                      oncely_rows *rows) {
    void *statement = prepare(text, params, param_count);
    if (statement == NULL) {
        return sql_fail();
    }
    int count = sqlite.column_count(statement);
    size_t column_count = (size_t)count, row_count = 0, capacity = 0;
    oncely_bytes *columns = oncely_alloc(column_count * sizeof *columns);
    for (int at = 0; at < count; at++) {
        columns[at] = oncely_format("%s", sqlite.column_name(statement, at));
    }
    oncely_value *values = NULL;
    int step;
    while ((step = sqlite.step(statement)) == SQLITE_ROW) {
        if (row_count == capacity) {
            capacity = capacity * 2 + 8;
            oncely_value *more = oncely_alloc(capacity * column_count * sizeof *more);
            if (row_count > 0) {
                memcpy(more, values, row_count * column_count * sizeof *more);
            }
            values = more;
        }
        for (int at = 0; at < count; at++) {
            values[row_count * column_count + (size_t)at] = column(statement, at);
        }
        row_count++;
    }
    bool is_done = step == SQLITE_DONE || sql_fail();
    sqlite.finalize(statement);
    *rows = (oncely_rows){row_count, column_count, columns, values};
    return is_done;
}

bool oncely_sql_execute(const char *text, const oncely_value *params, size_t param_count,
                        uint64_t *changed) {
    open_database();
    int before = sqlite.total_changes(host.database);
    oncely_rows rows;
    if (!oncely_sql_query(text, params, param_count, &rows)) {
        return false;
    }
    if (changed != NULL) {
        *changed = (uint64_t)(sqlite.total_changes(host.database) - before);
    }
    return true;
}

bool oncely_sql_defer(const char *text, const oncely_value *params, size_t param_count) {
    return oncely_sql_execute(text, params, param_count, NULL);
}

bool oncely_sql_is_sqlite(void) {
    return true;
}

// Outbox

bool oncely_send(const char *subject, oncely_bytes body, const oncely_send_options *options) {
    static const oncely_send_options NONE = {0};
    if (options == NULL) {
        options = &NONE;
    }
    const char *cause = options->caused_by;
    if (cause == NULL) {
        cause = host.message == NULL ? "" : host.message->id.data;
    }
    const char *id = options->id;
    if (id == NULL) {
        id = oncely_format("worker:%s:%zu", cause, host.sent).data;
    }
    host.sent++;
    oncely_header *headers = keep(options->header_count * sizeof *headers);
    for (size_t i = 0; i < options->header_count; i++) {
        headers[i].name = keep_bytes(options->headers[i].name);
        headers[i].value = keep_bytes(options->headers[i].value);
    }
    output *sent = keep(sizeof *sent);
    *sent = (output){
        .output =
            {
                .id = keep_text(id),
                .subject = keep_text(subject),
                .body = keep_bytes(body),
                .headers = headers,
                .header_count = options->header_count,
                .ordering_key = keep_text(options->ordering_key),
                .delay_ms = options->delay_ms,
            },
        .next = host.outputs,
    };
    host.outputs = sent;
    return true;
}

size_t oncely_test_output_count(void) {
    size_t count = 0;
    for (const output *sent = host.outputs; sent != NULL; sent = sent->next) {
        count++;
    }
    return count;
}

const oncely_output *oncely_test_output(size_t at) {
    // The newest output is the first of the list.
    size_t count = oncely_test_output_count();
    if (at >= count) {
        return NULL;
    }
    const output *sent = host.outputs;
    for (size_t i = count - 1; i > at; i--) {
        sent = sent->next;
    }
    return &sent->output;
}

// State

bool oncely_state_get(const char *key, bool *exists, oncely_bytes *value, uint64_t *version) {
    const entry *found = find(host.state, key);
    *exists = found != NULL && found->exists;
    *value = *exists ? found->value : (oncely_bytes){"", 0};
    if (version != NULL) {
        *version = *exists ? found->version : 0;
    }
    return true;
}

bool oncely_state_set(const char *key, oncely_bytes value, uint64_t *version) {
    entry *set = put(&host.state, key, value);
    set->version = ++host.last_version;
    if (version != NULL) {
        *version = set->version;
    }
    return true;
}

bool oncely_state_delete(const char *key, bool *existed) {
    entry *found = find(host.state, key);
    if (existed != NULL) {
        *existed = found != NULL && found->exists;
    }
    if (found != NULL) {
        found->exists = false;
    }
    return true;
}

bool oncely_state_compare_and_set(const char *key, const uint64_t *expected, oncely_bytes value,
                                  uint64_t *version) {
    const entry *found = find(host.state, key);
    bool exists = found != NULL && found->exists;
    if (exists == (expected != NULL) && (!exists || found->version == *expected)) {
        return oncely_state_set(key, value, version);
    }
    return oncely_fail_with((oncely_error){
        .reason = "version-mismatch",
        .text = oncely_string("version mismatch"),
        .exists = exists,
        .version = exists ? found->version : 0,
    });
}

const char *oncely_test_state(const char *key) {
    const entry *found = find(host.state, key);
    return found != NULL && found->exists ? found->value.data : NULL;
}

// Cache

bool oncely_cache_get(const char *key, bool *exists, oncely_bytes *value) {
    const entry *found = find(host.cache, key);
    *exists = found != NULL;
    *value = *exists ? found->value : (oncely_bytes){"", 0};
    return true;
}

bool oncely_cache_put(const char *key, oncely_bytes value, uint64_t ttl_ms, const char *const *tags,
                      size_t tag_count) {
    (void)ttl_ms;
    (void)tags;
    (void)tag_count;
    put(&host.cache, key, value);
    return true;
}

bool oncely_cache_invalidate(const char *const *tags, size_t tag_count) {
    (void)tags;
    (void)tag_count;
    host.cache = NULL;
    return true;
}

// Configuration, the current delivery and the log

const char *oncely_config(const char *key) {
    const entry *found = find(host.config, key);
    return found == NULL ? NULL : found->value.data;
}

const char *oncely_invocation_id(void) {
    return oncely_format("worker:%s", host.message == NULL ? "" : host.message->id.data).data;
}

const char *oncely_worker(void) {
    return "worker";
}

uint32_t oncely_version(void) {
    return 1;
}

uint32_t oncely_attempt(void) {
    return host.attempt;
}

uint32_t oncely_max_attempts(void) {
    return 10;
}

uint64_t oncely_now(void) {
    return host.now != 0 ? host.now : (uint64_t)time(NULL) * 1000000;
}

uint64_t oncely_remaining_ms(void) {
    return 10000;
}

const char *oncely_traceparent(void) {
    return host.message == NULL ? NULL : oncely_header_value(host.message, "traceparent");
}

void oncely_write_log(oncely_level level, oncely_bytes line) {
    if (level >= ONCELY_WARN) {
        fprintf(stderr, "log: %s\n", line.data);
    }
}

void oncely_write_panic(oncely_bytes text) {
    if (host.message != NULL) {
        host.panic_text = keep_bytes(text).data;
        longjmp(host.panic, 1);
    }
    fprintf(stderr, "%s\n", text.data);
}

// Deliveries

static oncely_result call_handler(const oncely_message *message) {
#ifdef ONCELY_BATCH
    oncely_result result = oncely_ok();
    oncely_handle_batch(message, &result, 1);
    return result;
#else
    return oncely_handle(message);
#endif
}

// Runs the handler. A panic jumps out of it.
static oncely_result run_handler(const oncely_message *message) {
    if (setjmp(host.panic) != 0) {
        return oncely_retry("trap", "%s", host.panic_text);
    }
    oncely_result result = call_handler(message);
    return result.kind == ONCELY_OK && host.is_doomed ? oncely_failed() : result;
}

oncely_result oncely_test_deliver_message(oncely_message message) {
    entry *state = host.state, *cache = host.cache;
    output *outputs = host.outputs;
    uint64_t last_version = host.last_version;
    host.state = copy_entries(state);
    host.cache = copy_entries(cache);
    if (host.database != NULL) {
        run_script("begin", "begin");
    }
    host.message = &message;
    host.sent = 0;
    host.is_doomed = false;

    oncely_result result = run_handler(&message);
    host.message = NULL;
    if (host.database != NULL) {
        const char *end = result.kind == ONCELY_OK ? "commit" : "rollback";
        run_script(end, end);
    }
    if (result.kind != ONCELY_OK) {
        host.state = state;
        host.cache = cache;
        host.outputs = outputs;
        host.last_version = last_version;
    }
    result.code = keep_text(result.code);
    result.text = keep_bytes(result.text);
    oncely_free_all();
    return result;
}

oncely_result oncely_test_deliver(const char *body) {
    return oncely_test_deliver_message((oncely_message){
        .id = oncely_string("event-1"),
        .subject = oncely_string("test"),
        .body = oncely_string(body),
    });
}

const char *oncely_test_rows(const char *query) {
    oncely_rows rows;
    if (!oncely_sql_query(query, ONCELY_NO_PARAMS, &rows)) {
        fprintf(stderr, "%s: %s\n", query, oncely_last_error()->text.data);
        exit(1);
    }
    oncely_bytes text = oncely_string("");
    for (size_t i = 0; i < rows.row_count * rows.column_count; i++) {
        const char *before = i == 0 ? "" : i % rows.column_count == 0 ? "\n" : "|";
        oncely_value value = rows.values[i];
        if (value.kind == ONCELY_INT64) {
            text = oncely_format("%s%s%lld", text.data, before, (long long)value.as.int64);
        } else if (value.kind == ONCELY_FLOAT64) {
            text = oncely_format("%s%s%.15g", text.data, before, value.as.float64);
        } else {
            const char *shown = value.kind == ONCELY_NULL ? "" : value.as.bytes.data;
            text = oncely_format("%s%s%s", text.data, before, shown);
        }
    }
    const char *kept = keep_text(text.data);
    oncely_free_all();
    return kept;
}

// The start and the end

static int compare_names(const void *left, const void *right) {
    return strcmp(*(const char *const *)left, *(const char *const *)right);
}

static void run_migration(const char *path) {
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        perror(path);
        exit(1);
    }
    oncely_bytes script = oncely_string("");
    char part[4096];
    size_t length;
    while ((length = fread(part, 1, sizeof part, file)) > 0) {
        script = oncely_format("%s%.*s", script.data, (int)length, part);
    }
    fclose(file);
    run_script(script.data, path);
}

static void run_migrations(const char *folder) {
    enum { FILES_MAX = 10000 };
    DIR *listing = opendir(folder);
    if (listing == NULL) {
        perror(folder);
        exit(1);
    }
    const char **paths = keep(FILES_MAX * sizeof *paths);
    size_t count = 0;
    for (struct dirent *file; (file = readdir(listing)) != NULL && count < FILES_MAX;) {
        size_t length = strlen(file->d_name);
        if (length > 4 && strcmp(file->d_name + length - 4, ".sql") == 0) {
            paths[count++] = oncely_format("%s/%s", folder, file->d_name).data;
        }
    }
    closedir(listing);
    qsort(paths, count, sizeof *paths, compare_names);
    open_database();
    for (size_t i = 0; i < count; i++) {
        run_migration(paths[i]);
    }
    oncely_free_all();
}

void oncely_test_start(const char *migrations) {
    oncely_test_end();
    host.attempt = 1;
    if (migrations != NULL) {
        run_migrations(migrations);
    }
}

int oncely_test_end(void) {
    if (host.database != NULL) {
        sqlite.close(host.database);
    }
    memset(&host, 0, sizeof host);
    while (all_kept != NULL) {
        kept *next = all_kept->next;
        free(all_kept);
        all_kept = next;
    }
    oncely_free_all();
    return failed_expectations == 0 ? 0 : 1;
}

void oncely_test_set_config(const char *key, const char *value) {
    put(&host.config, key, oncely_string(value));
}

void oncely_test_set_attempt(uint32_t attempt) {
    host.attempt = attempt;
}

void oncely_test_set_now(uint64_t now) {
    host.now = now;
}

void oncely_test_expect(bool condition, const char *text, const char *file, int line) {
    if (!condition) {
        fprintf(stderr, "%s:%d: not true: %s\n", file, line, text);
        failed_expectations++;
    }
}

void oncely_test_expect_text(const char *found, const char *expected, const char *file, int line) {
    if (found == NULL || strcmp(found, expected) != 0) {
        fprintf(stderr, "%s:%d: found `%s`, expected `%s`\n", file, line,
                found == NULL ? "NULL" : found, expected);
        failed_expectations++;
    }
}

#endif
