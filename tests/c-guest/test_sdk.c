// Tests of the package of C: JSON, rollback, SQL values, panics, headers.

#include "oncely/testing.h"

#include <string.h>

// Fails in the way that the body names.
oncely_result oncely_handle(const oncely_message *message) {
    const oncely_json_value *body = oncely_json_parse(message->body);
    if (body == NULL) {
        oncely_panic("no JSON of %zu bytes", message->body.length);
    }
    bool exists;
    oncely_bytes value, text;
    int64_t expected;
    ONCELY_TRY(oncely_state_set("key", message->body, NULL));
    ONCELY_TRY(oncely_state_get("key", &exists, &value, NULL));
    ONCELY_EXPECT(exists && value.length == message->body.length);
    if (oncely_json_string(oncely_json_get(body, "sql"), &text)) {
        ONCELY_TRY(oncely_sql_execute(text.data, ONCELY_NO_PARAMS, NULL));
    }
    if (oncely_json_int(oncely_json_get(body, "expected"), &expected)) {
        uint64_t version = (uint64_t)expected;
        ONCELY_TRY(oncely_state_compare_and_set("key", &version, value, NULL));
    }
    if (oncely_json_string(oncely_json_get(body, "text"), &text)) {
        ONCELY_TRY(oncely_send("out", oncely_string(oncely_json_quote(text)), NULL));
    }
    return oncely_ok();
}

static void effects_are_rolled_back(void) {
    oncely_test_start(NULL);
    oncely_result result = oncely_test_deliver("{oops");
    ONCELY_EXPECT(result.kind == ONCELY_RETRY);
    ONCELY_EXPECT_TEXT(result.code, "trap");
    ONCELY_EXPECT(strstr(result.text.data, "no JSON of 5 bytes") != NULL);

    result = oncely_test_deliver("{\"sql\": \"insert into missing values (1)\"}");
    ONCELY_EXPECT(result.kind == ONCELY_RETRY);
    ONCELY_EXPECT_TEXT(result.text.data, "no such table: missing (code 1)");
    ONCELY_EXPECT(oncely_test_state("key") == NULL);

    result = oncely_test_deliver("{\"text\": \"x\", \"expected\": 7}");
    ONCELY_EXPECT(result.kind == ONCELY_RETRY);
    ONCELY_EXPECT_TEXT(result.text.data, "version mismatch");
    ONCELY_EXPECT(oncely_test_output_count() == 0);
}

static void json_is_read_and_written(void) {
    oncely_test_start(NULL);
    const char *body = "{\"text\": \"\\u00e9\\ud834\\udd1e\\n\\u0001\\u0000x\\\"\\\\\\/\"}";
    ONCELY_EXPECT(oncely_test_deliver(body).kind == ONCELY_OK);
    const char *quoted = "\"\xc3\xa9\xf0\x9d\x84\x9e\\n\\u0001\\u0000x\\\"\\\\/\"";
    ONCELY_EXPECT_TEXT(oncely_test_output(0)->body.data, quoted);

    static const char *const VALID[] = {
        " 0 ", "-0", "1e5", "1.5E-3", "[]", "{}", "[ ]", "[1,[2,{\"a\":null}]]", "true", "\"\"",
    };
    static const char *const INVALID[] = {
        "",     "{",        "}",     "[1,]", "{\"a\":1,}", "01",          "1.",  "-",       "\"\\x\"",
        "nul",  "1 2",      "\"a",   "\"\\", "\"\xff\"",   "[\"\\u12\"]", ".5",  "{\"a\" 1}", "{a:1}",
        "+1",   "\"\\ud800\"", "\"\t\"",
    };
    for (size_t i = 0; i < sizeof VALID / sizeof *VALID; i++) {
        oncely_test_expect(oncely_json_parse(oncely_string(VALID[i])) != NULL, VALID[i], __FILE__,
                           __LINE__);
    }
    for (size_t i = 0; i < sizeof INVALID / sizeof *INVALID; i++) {
        oncely_test_expect(oncely_json_parse(oncely_string(INVALID[i])) == NULL, INVALID[i],
                           __FILE__, __LINE__);
    }
    char deep[1000];
    memset(deep, '[', sizeof deep);
    ONCELY_EXPECT(oncely_json_parse((oncely_bytes){deep, sizeof deep}) == NULL);

    int64_t number;
    const oncely_json_value *smallest = oncely_json_parse(oncely_string("-9223372036854775808"));
    ONCELY_EXPECT(oncely_json_int(smallest, &number) && number == INT64_MIN);
    const oncely_json_value *larger = oncely_json_parse(oncely_string("9223372036854775808"));
    ONCELY_EXPECT(!oncely_json_int(larger, &number));
}

static void sql_values_keep_their_types(void) {
    oncely_test_start(NULL);
    oncely_rows rows;
    oncely_bytes blob = {"\0\xff", 2}, bytes, text;
    bool boolean;
    int64_t number;
    double real;
    ONCELY_EXPECT(oncely_sql_query(
        "select $1 as n, $2 as b, $3 as i, $4 as f, $5 as d, $6 as x",
        ONCELY_PARAMS(oncely_null(), oncely_bool(true), oncely_int(INT64_MIN), oncely_float(0.5),
                      oncely_decimal("1.20"), oncely_blob(blob)),
        &rows));
    ONCELY_EXPECT(rows.row_count == 1 && rows.column_count == 6);
    ONCELY_EXPECT(!oncely_row_int(&rows, 0, "n", &number));
    ONCELY_EXPECT(!oncely_row_int(&rows, 1, "i", &number));
    ONCELY_EXPECT(!oncely_row_int(&rows, 0, "none", &number));
    ONCELY_EXPECT(oncely_row_bool(&rows, 0, "b", &boolean) && boolean);
    ONCELY_EXPECT(oncely_row_int(&rows, 0, "i", &number) && number == INT64_MIN);
    ONCELY_EXPECT(oncely_row_float(&rows, 0, "f", &real) && real == 0.5);
    ONCELY_EXPECT(oncely_row_text(&rows, 0, "d", &text) && oncely_equals(text, "1.20"));
    ONCELY_EXPECT(oncely_row_blob(&rows, 0, "x", &bytes) && bytes.length == 2);
}

static void headers_are_found_regardless_of_case(void) {
    oncely_header headers[] = {{oncely_string("Tag"), oncely_string("one")}};
    oncely_message message = {.headers = headers, .header_count = 1};
    ONCELY_EXPECT_TEXT(oncely_header_value(&message, "tAG"), "one");
    ONCELY_EXPECT(oncely_header_value(&message, "Tags") == NULL);
}

int main(void) {
    effects_are_rolled_back();
    json_is_read_and_written();
    sql_values_keep_their_types();
    headers_are_found_regardless_of_case();
    return oncely_test_end();
}
