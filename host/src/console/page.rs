//! The frame of each page: head, navigation, search, and the result of the last action.

use std::sync::LazyLock;

use axum::http::{Method, Uri, header};
use axum::response::{IntoResponse, Response};
use maud::{DOCTYPE, Markup, html};
use sha2::{Digest, Sha256};

use super::identity::Flash;
use super::links::encoded;
use super::parts::text;
use super::visitor::Visitor;

/// The path of the stylesheet.
pub const STYLESHEET: &str = "/assets/console.css";

/// The path of the icon.
pub const ICON: &str = "/assets/icon.svg";

const CSS: &str = include_str!("console.css");
const ICON_SVG: &str = include_str!("icon.svg");

/// The stylesheet with its digest, so that browsers can keep it.
static STYLESHEET_LINK: LazyLock<String> = LazyLock::new(|| {
    let digest = hex::encode(Sha256::digest(CSS.as_bytes()));
    format!("{STYLESHEET}?v={}", digest.get(..12).unwrap_or_default())
});

/// A part of the console, as the navigation shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    Now,
    Failures,
    Workers,
    Outputs,
    Streams,
    Hosts,
    Requests,
    Books,
    Activity,
}

impl Section {
    const ALL: [Section; 9] = [
        Section::Now,
        Section::Failures,
        Section::Workers,
        Section::Outputs,
        Section::Streams,
        Section::Hosts,
        Section::Requests,
        Section::Books,
        Section::Activity,
    ];

    fn link(self) -> (&'static str, &'static str) {
        match self {
            Section::Now => ("/", "Now"),
            Section::Failures => ("/failures", "Failures"),
            Section::Workers => ("/workers", "Workers"),
            Section::Outputs => ("/outputs", "Outputs"),
            Section::Streams => ("/streams", "Streams"),
            Section::Hosts => ("/hosts", "Hosts"),
            Section::Requests => ("/requests", "Requests"),
            Section::Books => ("/books", "Books"),
            Section::Activity => ("/activity", "Activity"),
        }
    }
}

/// One page.
pub struct Page<'p> {
    pub title: &'p str,
    /// None outside of the navigation.
    pub section: Option<Section>,
    /// None before the login.
    pub visitor: Option<&'p Visitor>,
    pub flash: Option<&'p Flash>,
    pub body: Markup,
}

impl Page<'_> {
    /// The complete document.
    pub fn render(self) -> Markup {
        html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (text(self.title)) " · Oncely" }
                    link rel="stylesheet" href=(STYLESHEET_LINK.as_str());
                    link rel="icon" href=(ICON);
                }
                body {
                    a.skip href="#main" { "Skip to content" }
                    @if let Some(visitor) = self.visitor { (top(visitor, self.section)) }
                    main #main tabindex="-1" {
                        @if let Some(flash) = self.flash {
                            @let class = if flash.is_error { "flash error" } else { "flash" };
                            div class=(class) role=(if flash.is_error { "alert" } else { "status" }) {
                                (text(&flash.text))
                            }
                        }
                        (self.body)
                    }
                }
            }
        }
    }
}

/// The navigation, the search and the way out.
fn top(visitor: &Visitor, section: Option<Section>) -> Markup {
    html! {
        header.top {
            a.brand href="/" { span.mark aria-hidden="true" {} "Oncely" }
            nav aria-label="Main" {
                @for each in Section::ALL {
                    @let (path, name) = each.link();
                    a href=(path) aria-current=[(section == Some(each)).then_some("page")] { (name) }
                }
            }
            form.search role="search" action="/search" method="get" {
                label.hidden for="search" { "Event id, dead letter number or subject" }
                input #search type="search" name="q" placeholder="Event, number or subject"
                    maxlength="300" autocomplete="off" spellcheck="false"
                    value=[visitor.query.get("q")];
                button.quiet type="submit" { "Search" }
            }
            form.out action="/logout" method="post" {
                (visitor.form_token())
                button.quiet type="submit" { "Log out" }
            }
        }
    }
}

/// The login page that returns to a page afterwards.
pub fn login_path(uri: &Uri, method: &Method) -> String {
    let here = uri.path_and_query().map_or("/", |path| path.as_str());
    if *method == Method::GET && here != "/" {
        format!("/login?next={}", encoded(here))
    } else {
        "/login".to_owned()
    }
}

/// The stylesheet. Its link changes with its content.
pub async fn stylesheet() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/css; charset=utf-8"),
        (header::CACHE_CONTROL, "public, max-age=31536000, immutable"),
    ];
    (headers, CSS).into_response()
}

/// The icon.
pub async fn icon() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "image/svg+xml"),
        (header::CACHE_CONTROL, "public, max-age=86400"),
    ];
    (headers, ICON_SVG).into_response()
}
