//! The OpenAPI document, made from the definition of the operations.

use std::sync::OnceLock;

use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::operation::{Action, CONSOLE_PROTOCOL, ENTRIES, Entry};
use crate::problem::{MEDIA_TYPE, Problem, ProblemKind};

/// Problems that any request may end with, if what is sent is not a request to the API.
const ANY: &[ProblemKind] = &[
    ProblemKind::Malformed,
    ProblemKind::TooSlow,
    ProblemKind::TooLarge,
    ProblemKind::Defect,
];

/// The document (OpenAPI 3.1), as text with a final newline.
pub fn document() -> &'static str {
    static DOCUMENT: OnceLock<String> = OnceLock::new();
    DOCUMENT.get_or_init(|| format!("{:#}\n", generate()))
}

fn generate() -> Value {
    let mut generator = SchemaSettings::draft2020_12()
        .with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        })
        .into_generator();
    let mut paths = Map::new();
    for entry in ENTRIES {
        let path = paths.entry(entry.path).or_insert_with(|| json!({}));
        if let Some(path) = path.as_object_mut() {
            path.insert(
                entry.method.name().to_ascii_lowercase(),
                operation(entry, &mut generator),
            );
        }
    }
    // So that it is defined even if no answer mentions it.
    generator.subschema_for::<Problem>();
    let mut schemas: Vec<_> = generator.take_definitions(true).into_iter().collect();
    schemas.sort_by(|(one, _), (other, _)| one.cmp(other));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "The control socket of a trapgate machine",
            "version": "1",
            "summary": "HTTP/1.1 with JSON over one Unix socket for each running machine",
            "description": "The sockets are in `$XDG_RUNTIME_DIR/trapgate`, or in `trapgate-UID` in the directory for temporary \
                files: `NAME.sock`. Only the user who started a machine, and root, can connect. A connection serves \
                one request. Requests have at most 64 KiB, and must arrive within 5 seconds. What is not HTTP \
                is answered by a bare 400 or 431; everything else that goes wrong by a problem (RFC 9457). \
                An answer that does not come at all, because the connection was closed, means that the machine has ended.",
            "license": { "name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0" },
        },
        "servers": [{ "url": "http://localhost/", "description": "curl --unix-socket NAME.sock http://localhost/v1/vm" }],
        "paths": paths,
        "components": { "schemas": schemas.into_iter().collect::<Map<_, _>>() },
    })
}

fn operation(entry: &Entry, generator: &mut SchemaGenerator) -> Value {
    let mut operation = Map::new();
    operation.insert("operationId".to_owned(), entry.id.into());
    operation.insert("summary".to_owned(), entry.summary.into());
    if !entry.description.is_empty() {
        operation.insert("description".to_owned(), entry.description.into());
    }
    let mut responses = Map::new();
    match entry.action {
        Action::Perform {
            request, answer, ..
        } => {
            if let Some(request) = request {
                let schema = request(generator);
                let body = json!({ "content": { "application/json": { "schema": schema } } });
                operation.insert("requestBody".to_owned(), body);
            }
            responses.insert(
                "200".to_owned(),
                done("application/json", &answer(generator).into()),
            );
        }
        Action::Console => {
            let header = |name: &str, value: &str| json!({ "name": name, "in": "header", "required": true, "schema": { "const": value } });
            let headers = [
                header("Connection", "Upgrade"),
                header("Upgrade", CONSOLE_PROTOCOL),
            ];
            operation.insert("parameters".to_owned(), headers.into_iter().collect());
            let switched = json!({ "description": "The connection carries the terminal's bytes from here on" });
            responses.insert("101".to_owned(), switched);
        }
        Action::Document => {
            responses.insert(
                "200".to_owned(),
                done("application/json", &json!({ "type": "object" })),
            );
        }
    }
    let mut problems: Vec<_> = ANY.iter().chain(entry.problems).collect();
    problems.sort_by_key(|kind| kind.status());
    for problem in problems {
        let schema = generator.subschema_for::<Problem>();
        let response = responses
            .entry(problem.status().to_string())
            .or_insert_with(
                || json!({ "description": "", "content": { MEDIA_TYPE: { "schema": schema } } }),
            );
        let title = match response["description"].as_str() {
            Some("") | None => problem.title().to_owned(),
            Some(before) => format!("{before}; or {}", problem.title()),
        };
        response["description"] = title.into();
    }
    operation.insert("responses".to_owned(), responses.into());
    operation.into()
}

fn done(media_type: &str, schema: &Value) -> Value {
    json!({ "description": "Done", "content": { media_type: { "schema": schema } } })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every `$ref` in a document.
    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(members) => {
                found.extend(members.get("$ref").and_then(Value::as_str));
                members.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn document_in_the_repository_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == document(),
            "docs/openapi.json is not current: cargo run -p trapgate-api --example openapi > docs/openapi.json"
        );
    }

    #[test]
    fn what_the_document_refers_to_is_in_it() {
        let document: Value = serde_json::from_str(document()).unwrap();
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 20);
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
    }

    #[test]
    fn every_operation_is_in_the_document_under_its_path() {
        let document: Value = serde_json::from_str(document()).unwrap();
        for entry in ENTRIES {
            let method = entry.method.name().to_ascii_lowercase();
            let operation = &document["paths"][entry.path][method];
            assert_eq!(operation["operationId"], entry.id);
            assert!(operation["responses"]["413"].is_object(), "{}", entry.id);
        }
    }
}
