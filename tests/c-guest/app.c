// The behaviours of the conformance suite in C; `tests/guests` has them in Rust.
//
// The behaviour is in the header `do`. Several names, separated by commas, run in sequence. The
// body may hold their options as JSON.

#include <string.h>
#include <unistd.h>

#include "oncely/oncely.h"

typedef const oncely_json_value *options;

static oncely_bytes string_option(options given, const char *name, const char *otherwise) {
    oncely_bytes value = oncely_string(otherwise);
    oncely_json_string(oncely_json_get(given, name), &value);
    return value;
}

static int64_t int_option(options given, const char *name, int64_t otherwise) {
    oncely_json_int(oncely_json_get(given, name), &otherwise);
    return otherwise;
}

static oncely_result insert(const oncely_message *message, options given) {
    unsigned char random[16];
    if (getentropy(random, sizeof random) != 0) {
        return oncely_retry(NULL, "no random numbers");
    }
    char nonce[2 * sizeof random + 1];
    for (size_t i = 0; i < sizeof random; i++) {
        memcpy(nonce + 2 * i, oncely_format("%02x", random[i]).data, 3);
    }
    int64_t delta = int_option(given, "delta", 1);
    ONCELY_TRY(oncely_sql_execute(
        "insert into effect (event_id, account, delta, attempt_nonce) "
        "values ($1, $2, $3, $6), ($1, $4, $5, $6)",
        ONCELY_PARAMS(oncely_text(message->id.data),
                      oncely_text(string_option(given, "from", "a").data), oncely_int(-delta),
                      oncely_text(string_option(given, "to", "b").data), oncely_int(delta),
                      oncely_text(nonce)),
        NULL));
    const char *subject = string_option(given, "subject", "out.effect").data;
    int64_t count = int_option(given, "n", 1);
    for (int64_t ordinal = 0; ordinal < count; ordinal++) {
        oncely_bytes body = oncely_format("{\"event_id\": %s, \"ordinal\": %lld}",
                                          oncely_json_quote(message->id), (long long)ordinal);
        ONCELY_TRY(oncely_send(subject, body, NULL));
    }
    return oncely_ok();
}

static oncely_result defer(const oncely_message *message, options given) {
    (void)message;
    const oncely_json_value *statement = oncely_json_get(given, "statements")->first;
    for (; statement != NULL; statement = statement->next) {
        oncely_bytes text, param;
        if (!oncely_json_string(oncely_json_get(statement, "sql"), &text) ||
            !oncely_json_string(oncely_json_get(statement, "params")->first, &param)) {
            return oncely_reject(NULL, "a statement has a text and a parameter");
        }
        ONCELY_TRY(oncely_sql_defer(text.data, ONCELY_PARAMS(oncely_text(param.data))));
    }
    return oncely_ok();
}

static oncely_result emit(const oncely_message *message, options given) {
    (void)message;
    oncely_bytes key;
    oncely_send_options send = {.delay_ms = (uint64_t)int_option(given, "delay_ms", 0)};
    if (oncely_json_string(oncely_json_get(given, "ordering_key"), &key)) {
        send.ordering_key = key.data;
    }
    ONCELY_TRY(oncely_send(string_option(given, "subject", "out.x").data, oncely_string("0"), &send));
    return oncely_ok();
}

static bool is_reserved(oncely_bytes name) {
    return strncmp(name.data, "Nats-", 5) == 0 || strncmp(name.data, "Oncely-", 7) == 0;
}

static oncely_result echo(const oncely_message *message, options given) {
    (void)given;
    oncely_header *headers = oncely_alloc(message->header_count * sizeof *headers);
    size_t count = 0;
    for (size_t i = 0; i < message->header_count; i++) {
        if (!is_reserved(message->headers[i].name)) {
            headers[count++] = message->headers[i];
        }
    }
    oncely_send_options send = {.headers = headers, .header_count = count};
    ONCELY_TRY(oncely_send("out.echo", message->body, &send));
    return oncely_ok();
}

static oncely_result fail_until(const oncely_message *message, options given) {
    (void)message;
    uint32_t attempt = oncely_attempt();
    if (attempt >= int_option(given, "attempt", 2)) {
        return oncely_ok();
    }
    int64_t after_ms = int_option(given, "after_ms", -1);
    if (after_ms >= 0) {
        return oncely_retry_after((uint64_t)after_ms, "requested-failure",
                                  "requested failure of attempt %u", attempt);
    }
    return oncely_retry("requested-failure", "requested failure of attempt %u", attempt);
}

static oncely_result reject(const oncely_message *message, options given) {
    (void)message;
    (void)given;
    return oncely_reject("requested-reject", "requested reject");
}

static oncely_result panic(const oncely_message *message, options given) {
    (void)message;
    (void)given;
    oncely_panic("requested panic");
}

static oncely_result state_counter(const oncely_message *message, options given) {
    (void)message;
    (void)given;
    bool exists;
    oncely_bytes value;
    uint64_t version;
    ONCELY_TRY(oncely_state_get("counter", &exists, &value, NULL));
    int64_t count = 0;
    if (exists && !oncely_json_int(oncely_json_parse(value), &count)) {
        return oncely_reject(NULL, "the counter is not a number");
    }
    count++;
    ONCELY_TRY(
        oncely_state_set("counter", oncely_format("%lld", (long long)count), &version));
    oncely_send_options send = {.ordering_key = "counter"};
    oncely_bytes body = oncely_format("{\"value\": %lld, \"version\": %llu}", (long long)count,
                                      (unsigned long long)version);
    ONCELY_TRY(oncely_send("out.state", body, &send));
    return oncely_ok();
}

static oncely_result state_cas(const oncely_message *message, options given) {
    (void)message;
    oncely_bytes key = string_option(given, "key", "cas");
    int64_t number;
    uint64_t wanted, version;
    const uint64_t *expected = NULL;
    if (oncely_json_int(oncely_json_get(given, "expected"), &number)) {
        wanted = (uint64_t)number;
        expected = &wanted;
    }
    if (!oncely_state_compare_and_set(key.data, expected, string_option(given, "value", "x"),
                                      &version)) {
        if (oncely_error_is("version-mismatch")) {
            return oncely_reject("version-mismatch", "%s", oncely_last_error()->text.data);
        }
        return oncely_failed();
    }
    oncely_bytes body = oncely_format("{\"key\": %s, \"version\": %llu}", oncely_json_quote(key),
                                      (unsigned long long)version);
    ONCELY_TRY(oncely_send("out.state", body, NULL));
    return oncely_ok();
}

static oncely_result sql_values(const oncely_message *message, options given) {
    (void)message;
    oncely_rows rows, texts;
    ONCELY_TRY(oncely_sql_query(string_option(given, "select", "").data, ONCELY_NO_PARAMS, &rows));
    if (rows.row_count != 1) {
        return oncely_reject(NULL, "the query has %zu rows", rows.row_count);
    }
    ONCELY_TRY(oncely_sql_query(string_option(given, "as_text", "").data, rows.values,
                                rows.column_count, &texts));
    oncely_bytes body = oncely_string("{");
    for (size_t at = 0; at < texts.column_count; at++) {
        oncely_value value = texts.values[at];
        const char *text =
            value.kind == ONCELY_NULL ? "null" : oncely_json_quote(value.as.bytes);
        body = oncely_format("%s%s%s: %s", body.data, at == 0 ? "" : ", ",
                             oncely_json_quote(texts.columns[at]), text);
    }
    ONCELY_TRY(oncely_send("out.values", oncely_format("%s}", body.data), NULL));
    return oncely_ok();
}

static const struct {
    const char *name;
    oncely_result (*run)(const oncely_message *message, options given);
} BEHAVIOURS[] = {
    {"insert", insert},
    {"defer", defer},
    {"emit", emit},
    {"echo", echo},
    {"fail_until", fail_until},
    {"reject", reject},
    {"panic", panic},
    {"state_counter", state_counter},
    {"state_cas", state_cas},
    {"sql_values", sql_values},
};

static oncely_result run(const char *name, const oncely_message *message, options given) {
    for (size_t i = 0; i < sizeof BEHAVIOURS / sizeof *BEHAVIOURS; i++) {
        if (strcmp(BEHAVIOURS[i].name, name) == 0) {
            return BEHAVIOURS[i].run(message, given);
        }
    }
    return oncely_reject("unknown-behaviour", "there is no behaviour %s", name);
}

oncely_result oncely_handle(const oncely_message *message) {
    const char *wanted = oncely_header_value(message, "do");
    char *names = oncely_alloc(strlen(wanted == NULL ? "" : wanted) + 1);
    strcpy(names, wanted == NULL ? "" : wanted);
    options given = oncely_json_parse(message->body);
    for (char *name = strtok(names, ", "); name != NULL; name = strtok(NULL, ", ")) {
        oncely_result result = run(name, message, given);
        if (result.kind != ONCELY_OK) {
            return result;
        }
    }
    return oncely_ok();
}
