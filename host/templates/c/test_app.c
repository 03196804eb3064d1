// Tests of the handler without WebAssembly, on SQLite in memory: `make test`.

#include "oncely/testing.h"

static void an_order_is_stored_and_announced(void) {
    oncely_test_start("migrations");
    oncely_result result = oncely_test_deliver("{\"id\": \"o1\", \"cents\": 500}");
    ONCELY_EXPECT(result.kind == ONCELY_OK);
    ONCELY_EXPECT_TEXT(oncely_test_rows("select id, cents from orders"), "o1|500");
    ONCELY_EXPECT(oncely_test_output_count() == 1);
    ONCELY_EXPECT_TEXT(oncely_test_output(0)->subject, "{{name}}.accepted");
    ONCELY_EXPECT_TEXT(oncely_test_output(0)->body.data, "{\"id\":\"o1\"}");
}

static void an_order_without_an_amount_is_rejected(void) {
    oncely_test_start("migrations");
    oncely_result result = oncely_test_deliver("{\"id\": \"o1\", \"cents\": 0}");
    ONCELY_EXPECT(result.kind == ONCELY_REJECT);
    ONCELY_EXPECT_TEXT(result.code, "malformed");
    ONCELY_EXPECT(oncely_test_output_count() == 0);
}

int main(void) {
    an_order_is_stored_and_announced();
    an_order_without_an_amount_is_rejected();
    return oncely_test_end();
}
