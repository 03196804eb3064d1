// Tests of the handler without WebAssembly: `make test`.

#include "oncely/testing.h"

static void greetings_are_counted_by_name(void) {
    oncely_test_start(NULL);
    const char *names[] = {"Ada", "Bob", "Ada"};
    for (size_t i = 0; i < 3; i++) {
        oncely_bytes body = oncely_format("{\"name\": %s}", oncely_json_quote(oncely_string(names[i])));
        ONCELY_EXPECT(oncely_test_deliver(body.data).kind == ONCELY_OK);
    }
    ONCELY_EXPECT(oncely_test_output_count() == 3);
    ONCELY_EXPECT_TEXT(oncely_test_output(1)->body.data, "{\"greeting\": \"Hello Bob\", \"times\": 1}");
    ONCELY_EXPECT_TEXT(oncely_test_output(2)->body.data, "{\"greeting\": \"Hello Ada\", \"times\": 2}");
}

static void a_body_without_a_name_is_rejected(void) {
    oncely_test_start(NULL);
    oncely_result result = oncely_test_deliver("{\"nom\": \"Ada\"}");
    ONCELY_EXPECT(result.kind == ONCELY_REJECT);
    ONCELY_EXPECT_TEXT(result.code, "malformed");
    ONCELY_EXPECT(oncely_test_output_count() == 0);
}

int main(void) {
    greetings_are_counted_by_name();
    a_body_without_a_name_is_rejected();
    return oncely_test_end();
}
