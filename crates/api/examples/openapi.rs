//! Prints the OpenAPI document: `cargo run -p trapgate-api --example openapi > docs/openapi.json`.

fn main() {
    print!("{}", trapgate_api::openapi::document());
}
